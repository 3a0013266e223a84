"""Load a frozen base in 4 bits: from the Hub, from a folder, or from a GGUF file."""

from __future__ import annotations

import copy
import ctypes
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from qalora.adapter.provenance import Provenance
from qalora.base.checkpoint import (
    Checkpoint,
    Quantization,
    Weights,
    check_left_out,
    open_checkpoint,
    open_config,
    original_weights,
    storage_dtype,
)
from qalora.base.device import best_device
from qalora.base.families import NAMES, WRAPPED
from qalora.base.fingerprint import fingerprint, stored_as
from qalora.base.parts import Part, attention_of, from_checkpoint, whole
from qalora.base.quantized import guard_cpu_packing, is_4bit, linear_maps, quantized
from qalora.base.registry import (
    ModelSource,
    check_family,
    hub_hint,
    quantization_in,
    read_fields,
    resolve,
    shape_of,
)
from qalora.base.structure import structure_of
from qalora.base.weight_files import base_folder, weight_files
from qalora.base.wrapper import name_as_in_wrapper
from qalora.environment import check_one_process
from qalora.errors import InputError, check_choice
from qalora.progress import in_place_of_transformers


@dataclass
class LoadedBase:
    """What `load_base` gives."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    compute_dtype: torch.dtype
    quantized: bool

    def original(self) -> Weights:
        """The base's 16-bit weights, read from its files a linear layer at a time: name → (out, in).

        Raises:
            InputError: the base is stored in 4 bits.
        """
        return original_weights(open_checkpoint(self.source)[0], self.source.name)

    def provenance(self, weights: str | None = None) -> Provenance:
        """What an adapter says of the base that it was trained on, for `save_adapter`; merging and generating then load
        the base as it was here.

        Args:
            weights: the fingerprint of its files, where it is known already.
        """
        stored = getattr(self.model.config, "quantization_config", None) if self.quantized else None
        return Provenance(
            model=self.source.hub_id or self.source.name,
            quant_type=None if stored is None else stored.bnb_4bit_quant_type,
            double_quant=stored is not None and stored.bnb_4bit_use_double_quant,
            compute_dtype=str(self.compute_dtype).removeprefix("torch."),
            base=weights or fingerprint(self.source),
            stored_as=stored_as(self.source),
        )


def load_base(
    source: ModelSource | str | Path,
    *,
    load_in_4bit: bool = True,
    quant_type: str = "nf4",
    double_quant: bool = True,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> LoadedBase:
    """Loads a base for training: every parameter frozen, the linear layers of its blocks in 4 bits, all else in one
    compute dtype.

    Args:
        source: a registered name, a folder, a GGUF file, a Hub id, or what `registry.resolve` found.
        load_in_4bit: False gives a 16- or 32-bit base, in the compute dtype.
        quant_type: nf4 or fp4.
        double_quant: also quantize the quantization constants.
        dtype: auto, bfloat16, float16 or float32, or torch's own; auto takes bfloat16 on CUDA (float16 before
            Ampere), and on a CPU whichever of bfloat16 and float32 is measured as faster.
        device: default: the accelerator that torch has and bitsandbytes computes on, else the CPU.
        tokenizer: what `load_tokenizer` gave, where it was called already.

    Returns:
        `.model`, a causal LM of transformers; `.tokenizer`; `.original()`, the 16-bit weights that `start` reads;
        `.provenance()`, which `save_adapter` takes; `.compute_dtype`; `.source`, where the weights are; and
        `.quantized`.

    Raises:
        InputError: the model cannot be found, is none that can be trained, or the dtype does not suit the device; no
            such device; or there are several processes.
    """
    check_one_process()
    dtype = str(dtype).removeprefix("torch.")
    check_choice("dtype", dtype, ("auto", "bfloat16", "float16", "float32"))
    check_choice("quant_type", quant_type, ("nf4", "fp4"))
    if not isinstance(source, ModelSource):
        source = resolve(str(source))
    # With its index: accelerate takes "cuda" and "cuda:0" for different devices.
    device = str(device or best_device())
    _check_device(device)
    check_base(source, in_4bit=load_in_4bit)
    compute_dtype = choose_compute_dtype(dtype, device)
    tokenizer = tokenizer or load_tokenizer(source)
    model: Any = load_model(
        source, Quantization(quant_type if load_in_4bit else None, double_quant, compute_dtype), device
    )
    give_back_memory()
    name_as_in_wrapper(model)
    _refuse_ragged_rows(source, model, device)
    model.config.use_cache = False
    # What PEFT writes as base_model_name_or_path: a published name rather than a path of this machine.
    model.name_or_path = model.config.name_or_path = source.hub_id or source.location
    return LoadedBase(model, tokenizer, source, compute_dtype, load_in_4bit)


def give_back_memory() -> None:
    """What is free goes back to the system, where the C library can: glibc keeps what lies between what is held."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def load_model(
    source: ModelSource,
    quantization: Quantization,
    device: str,
    part: Part | None = None,
    *,
    attention: str = "sdpa",
    gguf: tuple[Checkpoint, PreTrainedConfig] | None = None,
) -> PreTrainedModel:
    """The frozen model as it is trained on; transformers decides what it reads, but for GGUF files. The whole comes
    with a bar.

    Args:
        part: None: the whole.
        gguf: what `open_checkpoint` gave for a GGUF file, where it was called already.
    """
    check_base(source, in_4bit=quantization.quant_type is not None)
    if source.gguf_file:
        model = _from_gguf(*(gguf or open_checkpoint(source)), quantization, device, part, attention)
    else:
        model = _from_pretrained(source, quantization, device, part, attention)
    _set_compute_dtype(model, quantization.compute_dtype)
    guard_cpu_packing(model)
    return model.requires_grad_(False)


def check_base(source: ModelSource, *, in_4bit: bool) -> None:
    """
    Raises:
        InputError: no such model, none that can be trained, a file of it is missing, or it is stored in another
            precision.
    """
    folder = base_folder(source)
    published = {} if source.gguf_file else read_fields(folder / "config.json")
    check_family(published, f"--model {source.name}")
    weight_files(folder, source.gguf_file, name=source.name)
    if source.gguf_file:
        return
    if quantization_in(published, source.name) and not in_4bit:
        raise InputError(
            f"--model {source.name}: stored in 4 bits; load it so, or use the 16-bit model it was made from."
        )


def stored_quantization(source: ModelSource) -> dict[str, Any]:
    """The settings of a base that is stored in 4 bits; empty of another.

    Raises:
        InputError: no such model, or stored with another quantization.
    """
    if source.gguf_file:
        return {}
    return quantization_in(read_fields(base_folder(source) / "config.json"), source.name)


def load_tokenizer(source: ModelSource, *, spare_tokens: bool = False) -> PreTrainedTokenizerBase:
    """The base's fast tokenizer, padding on the right; a missing pad token is the unknown or the end token, so that
    the vocabulary never grows.

    Args:
        spare_tokens: also one with tokens that the model has no embeddings for, where no such token will be used.

    Raises:
        InputError: no tokenizer there, or one with tokens that the model has no embeddings for.
    """
    tokenizer = read_tokenizer(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InputError(
            f"--model {source.name}: the tokenizer has no pad, unknown or end token; give it one (pad_token)."
        )
    tokenizer.padding_side = "right"
    if not spare_tokens:
        check_vocabulary(tokenizer, source)
    return tokenizer


def read_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The base's fast tokenizer as it was published, without a setting of ours.

    Raises:
        InputError: no tokenizer there.
    """
    if source.gguf_file:
        from qalora.base.gguf_reader import check_tokenizer

        check_tokenizer(Path(source.location) / source.gguf_file, source.name)
    # A GGUF file says itself how its tokenizer splits; AutoTokenizer asks first which architecture it is.
    loader: Any = PreTrainedTokenizerFast if source.gguf_file else AutoTokenizer
    tokenizer: PreTrainedTokenizerBase = _found(source, loader.from_pretrained)
    if not tokenizer.is_fast:
        raise InputError(
            f"--model {source.name}: no fast tokenizer (tokenizer.json); convert it once with transformers."
        )
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> None:
    """
    Raises:
        InputError: tokens that the model has no embeddings for.
    """
    rows = shape_of(source).vocab_size
    if beyond := sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows):
        named = ", ".join(f"{token!r} is {i}" for i, token in beyond[:3])
        raise InputError(
            f"--model {source.name}: the tokenizer has {len(beyond)} tokens that the model has no embeddings for "
            f"({named}; the last embedding is {rows - 1}); take them out of the tokenizer's files, or resize the "
            "embeddings once with transformers' resize_token_embeddings and save the model."
        )


def choose_compute_dtype(requested: str, device: str) -> torch.dtype:
    """The dtype of activations and of unquantized weights.

    auto: bfloat16 on CUDA from Ampere on and float16 before it, bfloat16 on an XPU that has it; on a CPU whichever
    of bfloat16
    and float32 is measured to be faster, for that differs between processors.

    Raises:
        InputError: a dtype that the device is slow or wrong with.
    """
    kind = torch.device(device).type
    ampere = kind == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    if requested == "auto":
        if kind == "cuda":
            return torch.bfloat16 if ampere else torch.float16
        if kind == "xpu" and torch.xpu.is_bf16_supported():
            return torch.bfloat16
        return _faster_on_cpu() if kind == "cpu" else torch.float32
    if requested == "float16" and kind == "cpu":
        raise InputError("--dtype float16: a CPU computes fp16 about 100 times slower; use bfloat16, float32 or auto.")
    if requested == "bfloat16" and kind == "cuda" and not ampere:
        name = torch.cuda.get_device_name(device)
        raise InputError(f"--dtype bfloat16: {name} has no bf16 arithmetic (it came with Ampere); use float16 or auto.")
    return getattr(torch, requested)


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f"device={device!r}: no device of torch; pass cpu, cuda or cuda:0.") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={device!r}: torch finds no CUDA device here (see `qalora doctor`); pass cpu.")


@cache
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
    source: ModelSource, quantization: Quantization, device: str, part: Part | None, attention: str
) -> PreTrainedModel:
    """Each weight is quantized as it is read: the 16-bit model never exists as a whole."""
    folder = replace(source, location=str(base_folder(source)))
    loader: Any = AutoModelForCausalLM
    config = open_config(folder)
    options: dict[str, Any] = {
        "dtype": quantization.compute_dtype,
        "attn_implementation": attention_of(config, attention),
        "device_map": {"": device},
    }
    if quantization.quant_type and not getattr(config, "quantization_config", None):
        options["quantization_config"] = _quantization_config(quantization, config)
    wrapped = hasattr(config, WRAPPED)
    if wrapped or part is not None:  # a class that leaves the rest of the files unread without a word
        options |= {"config": config, "key_mapping": NAMES if wrapped else None}
        loader = (part or whole(config)).of(config)
    with in_place_of_transformers(_word(quantization) if part is None else None):
        model, report = _found(folder, loader.from_pretrained, output_loading_info=True, **options)
    if report["missing_keys"]:  # transformers makes them up at random
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise InputError(
            f"--model {source.name}: {source.location} lacks {len(report['missing_keys'])} weights ({names})."
        )
    check_left_out(report["unexpected_keys"], model.state_dict(), f"--model {source.name}: {source.location}")
    return model  # type: ignore[no-any-return]


def _from_gguf(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    quantization: Quantization,
    device: str,
    part: Part | None,
    attention: str,
) -> PreTrainedModel:
    """A tensor at a time: read in host memory, quantized on the device."""
    config = copy.deepcopy(config)
    model: Any = from_checkpoint(
        checkpoint,
        config,
        part or whole(config),
        dtype=storage_dtype(quantization, is_gguf=True),
        device="cpu" if quantization.quant_type else device,
        attention=attention,
        convert=partial(
            quantized,
            quant_type=quantization.quant_type,
            double_quant=quantization.double_quant,
            compute_dtype=quantization.compute_dtype,
            device=device,
        )
        if quantization.quant_type
        else None,
        progress=_word(quantization) if part is None else None,
    )
    model.to(device)
    model.hf_device_map = {"": device}  # which accelerate compares with the device that is trained on
    if quantization.quant_type:
        _declare_quantized(model, _quantization_config(quantization, config))
    return model  # type: ignore[no-any-return]


def _word(quantization: Quantization) -> str:
    """What a bar calls the loading."""
    return "loading in 4 bits" if quantization.quant_type else "loading"


def _found(source: ModelSource, load: Any, **options: Any) -> Any:
    """Calls a from_pretrained of transformers, with its many ways to say "not there" made one sentence."""
    reading: AbstractContextManager[None] = nullcontext()
    if source.gguf_file:
        from qalora.base.gguf_reader import fast_gguf

        options["gguf_file"], reading = source.gguf_file, fast_gguf()
    try:
        with reading:
            return load(source.location, **options)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        hint = {
            "hub": hub_hint(source),
            "folder": "it needs config.json, the weights and a tokenizer",
            "gguf": "only LLaMA-class GGUF files with their tokenizer can be read",
        }[source.kind]
        raise InputError(
            f"--model {source.name}: {source.location} cannot be loaded; {hint}. ({reason[:300]})"
        ) from error


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
                f"--model {source.name}: {name} has {module.in_features} inputs, and bitsandbytes dequantizes rows "
                f"that are no multiple of {block}, its block, wrongly on a CPU; use a GPU, or the 16-bit model with "
                "--no-quantize."
            )


def _quantization_config(quantization: Quantization, config: PreTrainedConfig) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=quantization.compute_dtype,
        llm_int8_skip_modules=list(structure_of(config).others),
    )


def _declare_quantized(model: Any, config: BitsAndBytesConfig) -> None:
    """Tells transformers and PEFT what `quantize_` did, so that save_pretrained writes a 4-bit checkpoint."""
    from transformers.quantizers import AutoHfQuantizer

    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.is_loaded_in_4bit = True
    model.is_quantized = True
    model.quantization_method = config.quant_method
