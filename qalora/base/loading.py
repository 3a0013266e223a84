"""Load a frozen base in 4 bits: from the Hub, from a folder, or from a GGUF file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qalora.base.gguf_config import gguf_config
from qalora.base.gguf_reader import fast_gguf
from qalora.base.prefixes import ATTENTION
from qalora.base.quantized import guard_cpu_packing, is_4bit, linear_maps, quantize_
from qalora.base.registry import ModelSource, check_model_type, read_fields
from qalora.environment import check_one_process
from qalora.errors import InputError


@dataclass
class LoadedBase:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    compute_dtype: torch.dtype
    quantized: bool


def load_base(
    source: ModelSource,
    *,
    load_in_4bit: bool = True,
    quant_type: str = "nf4",
    double_quant: bool = True,
    dtype: str = "auto",
    device: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> LoadedBase:
    """Loads a base for training: every parameter frozen, the linear maps of its blocks in 4 bits, all else in one
    compute dtype.

    Args:
        source: what `registry.resolve` found.
        load_in_4bit: False gives a 16- or 32-bit base, in the compute dtype.
        quant_type: nf4 or fp4.
        double_quant: also quantize the quantization constants.
        dtype: auto, bfloat16, float16 or float32; see `choose_compute_dtype`.
        device: default: CUDA where there is one, else the CPU.
        tokenizer: what `load_tokenizer` gave, where it was called already.

    Raises:
        InputError: the model cannot be found, is no LLaMA-class decoder, or the dtype does not suit the device; or there are several
            processes.
    """
    check_one_process()
    # With its index: accelerate takes "cuda" and "cuda:0" for different devices.
    device = device or (f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")
    compute_dtype = choose_compute_dtype(dtype, device)
    tokenizer = tokenizer or load_tokenizer(source)
    published = _published_config(source)
    if published is not None:
        check_model_type(published.get("model_type"), f"--model {source.name}")
    stored_4bit = published is not None and _stored_in_4bit(published, source)
    if stored_4bit and not load_in_4bit:
        raise InputError(
            f"--model {source.name}: stored in 4 bits; load it so, or use the 16-bit model it was made from."
        )
    config = _quantization_config(quant_type, double_quant, compute_dtype) if load_in_4bit else None
    model: Any
    if source.kind == "gguf" and config is not None:
        # transformers dequantizes a GGUF file's weights, and cannot quantize them anew in the same load. In host memory, for the
        # 16-bit model may be larger than the GPU.
        model = _from_pretrained(source, storage_dtype(compute_dtype), "cpu")
        quantize_(model, quant_type=quant_type, double_quant=double_quant, compute_dtype=compute_dtype, device=device)
        model.to(device)
        if hasattr(model, "hf_device_map"):  # which accelerate compares with the device that is trained on
            model.hf_device_map = {"": device}
        _declare_quantized(model, config)
    else:
        model = _from_pretrained(source, compute_dtype, device, None if stored_4bit else config)
    check_model_type(model.config.model_type, f"--model {source.name}")
    _set_compute_dtype(model, compute_dtype)
    _refuse_ragged_rows(source, model, device)
    guard_cpu_packing(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    # What PEFT writes as base_model_name_or_path: a published name rather than a path of this machine.
    model.name_or_path = model.config.name_or_path = source.hub_id or source.location
    return LoadedBase(model, tokenizer, source, compute_dtype, load_in_4bit)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The base's fast tokenizer, padding on the right; a missing pad token is the unknown or the end token, so that
    the vocabulary never grows.

    Raises:
        InputError: no tokenizer there.
    """
    tokenizer = _found(source, AutoTokenizer.from_pretrained)
    if not tokenizer.is_fast:
        raise InputError(
            f"--model {source.name}: no fast tokenizer (tokenizer.json); convert it once with transformers."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InputError(
            f"--model {source.name}: the tokenizer has no pad, unknown or end token; give it one (pad_token)."
        )
    tokenizer.padding_side = "right"
    return tokenizer


def choose_compute_dtype(requested: str, device: str) -> torch.dtype:
    """The dtype of activations and of unquantized weights.

    auto: bfloat16 on CUDA from Ampere on and float16 before it; on a CPU whichever of bfloat16 and float32 is measured
    to be faster, for that differs between processors.

    Raises:
        InputError: a dtype that the device is slow or wrong with.
    """
    kind = torch.device(device).type
    ampere = kind == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    if requested == "auto":
        if kind == "cuda":
            return torch.bfloat16 if ampere else torch.float16
        return _faster_on_cpu() if kind == "cpu" else torch.float32
    if requested == "float16" and kind == "cpu":
        raise InputError("--dtype float16: a CPU computes fp16 about 100 times slower; use bfloat16, float32 or auto.")
    if requested == "bfloat16" and kind == "cuda" and not ampere:
        name = torch.cuda.get_device_name(device)
        raise InputError(f"--dtype bfloat16: {name} has no bf16 arithmetic (it came with Ampere); use float16 or auto.")
    return getattr(torch, requested)


def _faster_on_cpu() -> torch.dtype:
    def seconds(dtype: torch.dtype) -> float:
        x, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - start)
        return min(times)

    return min((torch.float32, torch.bfloat16), key=seconds)


def _from_pretrained(
    source: ModelSource, dtype: torch.dtype, device: str, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """With `quantization` each weight is quantized as it is read: the 16-bit model never exists as a whole."""
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": ATTENTION, "device_map": {"": device}}
    if source.gguf_file:
        options["config"] = _found(source, gguf_config)
        # transformers keeps a GGUF file's weights packed unless asked to dequantize them.
        options["quantization_config"] = GgufConfig(dequantize=True)
    elif quantization is not None:
        options["quantization_config"] = quantization
    model, report = _found(source, AutoModelForCausalLM.from_pretrained, output_loading_info=True, **options)
    if report["missing_keys"]:  # transformers makes them up at random
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise InputError(
            f"--model {source.name}: {source.location} lacks {len(report['missing_keys'])} weights ({names})."
        )
    if source.gguf_file and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _found(source: ModelSource, load: Any, **options: Any) -> Any:
    """Calls a from_pretrained of transformers, with its many ways to say "not there" made one sentence."""
    if source.gguf_file:
        options["gguf_file"] = source.gguf_file
    try:
        with fast_gguf():
            return load(source.location, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        hint = {
            "hub": "check the name, HF_TOKEN for gated models, and HF_HUB_OFFLINE if it should be downloaded",
            "folder": "it needs config.json, the weights and a tokenizer",
            "gguf": "only LLaMA-class GGUF files with their tokenizer can be read",
        }[source.kind]
        raise InputError(
            f"--model {source.name}: {source.location} cannot be loaded; {hint}. ({reason[:300]})"
        ) from error


def _published_config(source: ModelSource) -> dict[str, Any] | None:
    """config.json of a base, None of one that is registered or has none (GGUF): what it says of itself before its weights load."""
    if source.kind == "folder":
        return read_fields(Path(source.location) / "config.json")
    if source.kind == "hub" and source.shape is None:
        return _found(source, AutoConfig.from_pretrained).to_dict()  # type: ignore[no-any-return]
    return None


def _stored_in_4bit(config: dict[str, Any], source: ModelSource) -> bool:
    """
    Raises:
        InputError: stored with another quantization.
    """
    quantization = config.get("quantization_config") or {}
    if quantization and not quantization.get("load_in_4bit"):
        raise InputError(
            f"--model {source.name}: stored with {quantization.get('quant_method')} quantization; "
            "use the 16-bit model, or one saved in bitsandbytes' 4-bit."
        )
    return bool(quantization)


def storage_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    # fp32 would double the peak for weights that a GGUF file has in fewer bits anyway.
    return torch.bfloat16 if compute_dtype == torch.float32 else compute_dtype


def _set_compute_dtype(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Of the 4-bit maps, for a checkpoint saved in 4 bits ignores the dtype that from_pretrained is given, and of
    embeddings, norms, biases and head: `model.to(dtype)` is refused for quantized models."""
    # 4-bit codes may be stored under a floating-point dtype (bnb_4bit_quant_storage) and are no numbers to cast.
    codes = set()
    module: Any
    for module in model.modules():
        if is_4bit(module):
            module.compute_dtype, module.compute_type_is_set = compute_dtype, True
            module.weight.quant_state.dtype = compute_dtype
            codes.add(id(module.weight))
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in codes:
            parameter.data = parameter.data.to(compute_dtype)
    model.config.dtype = compute_dtype


def _refuse_ragged_rows(source: ModelSource, model: PreTrainedModel, device: str) -> None:
    """bitsandbytes 0.50 on a CPU with AVX-512 lays blocks along each row, but quantizes the flattened matrix."""
    if torch.device(device).type != "cpu":
        return
    module: Any
    for name, module in linear_maps(model).items():
        block = module.weight.quant_state.blocksize if is_4bit(module) else 1
        if module.in_features % block:
            raise InputError(
                f"--model {source.name}: {name} has {module.in_features} inputs, and bitsandbytes dequantizes rows that are no "
                f"multiple of {block}, its block, wrongly on a CPU; use a GPU, or the 16-bit model with --no-quantize."
            )


def _quantization_config(quant_type: str, double_quant: bool, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=["lm_head"],
    )


def _declare_quantized(model: Any, config: BitsAndBytesConfig) -> None:
    """Tells transformers and PEFT what `quantize_` did, so that save_pretrained writes a 4-bit checkpoint."""
    from transformers.quantizers import AutoHfQuantizer

    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.is_loaded_in_4bit = True
    model.is_quantized = True
    model.quantization_method = config.quant_method
