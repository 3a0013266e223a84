"""The files that are read, and the head that is tied, are those of vanilla transformers, for training and for
merging."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qalora.adapter.model import attach, write_adapter
from qalora.base.checkpoint import open_checkpoint
from qalora.base.gguf_reader import GGUFReader
from qalora.base.loading import load_base, load_tokenizer
from qalora.base.registry import resolve, shape_of
from qalora.deploy.gguf import Writer
from qalora.deploy.merging import merge
from qalora.errors import InputError

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def published(save_tiny_llama, tmp_path_factory):
    """Untied, in one file."""
    return save_tiny_llama(tmp_path_factory.mktemp("published"))


@pytest.fixture
def folder(published, tmp_path):
    shutil.copytree(published, tmp_path / "base")
    return tmp_path / "base"


def other(tensors):
    return {name: tensor + 0.5 for name, tensor in tensors.items()}


def index(folder, name, weight_map):
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def in_shards(folder, tensors, ending="safetensors"):
    """Two files and their index; returns nothing else in the folder's weights changed."""
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-0000{i}-of-00002.{ending}"
        write = save_file if ending == "safetensors" else torch.save
        write({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index(folder, f"{stem}.{ending}.index.json", weight_map)


def stale_index(folder, tensors):
    in_shards(folder, other(tensors))


def only_shards(folder, tensors):
    (folder / "model.safetensors").unlink()
    in_shards(folder, tensors)


def shards_beside_bin(folder, tensors):
    only_shards(folder, tensors)
    torch.save(other(tensors), folder / "pytorch_model.bin")


def shards_beside_unlisted_files(folder, tensors):
    only_shards(folder, tensors)
    save_file(other(tensors), folder / "zzz.safetensors")


def bin_beside_an_adapter(folder, tensors):
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    save_file(other(tensors), folder / "adapter_model.safetensors")


def bin_beside_other_bins(folder, tensors):
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    torch.save(other(tensors), folder / "pytorch_model-00001-of-00001.bin")


def old_bins(folder, tensors):
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def bins_in_shards(folder, tensors):
    (folder / "model.safetensors").unlink()
    in_shards(folder, tensors, "bin")


def safetensors_beside_bin(folder, tensors):
    torch.save(other(tensors), folder / "pytorch_model.bin")


def named_in_the_config(folder, tensors):
    save_file(other(tensors), folder / "mine.safetensors")
    change_config(folder, transformers_weights="mine.safetensors")


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def another_variant_beside(folder, tensors):
    save_file(other(tensors), folder / "model.fp16.safetensors")


LAYOUTS = [
    stale_index, only_shards, shards_beside_bin, shards_beside_unlisted_files, bin_beside_an_adapter,
    bin_beside_other_bins, old_bins, bins_in_shards, safetensors_beside_bin, named_in_the_config,
    another_variant_beside,
]  # fmt: skip


def agree(folder):
    """Vanilla transformers, training and merging have the same tensors and the same tie; returns whether it is tied."""
    vanilla = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trained = load_base(resolve(str(folder)), load_in_4bit=False, dtype="float32", device="cpu").model
    in_4_bit = load_base(resolve(str(folder)), dtype="float32", device="cpu").model
    checkpoint, config = open_checkpoint(resolve(str(folder)))
    tied = vanilla.lm_head.weight is vanilla.model.embed_tokens.weight
    for model in (trained, in_4_bit):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert torch.equal(model.lm_head.weight, vanilla.lm_head.weight)
    assert config.tie_word_embeddings == tied
    state = dict(vanilla.named_parameters())
    for name, tensor in state.items():
        assert torch.equal(torch.cat(list(checkpoint.pieces(name))), tensor), name
        assert torch.equal(trained.get_parameter(name), tensor), name
    return tied


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_training_and_merging_read_the_files_that_transformers_reads(folder, layout):
    layout(folder, load_file(folder / "model.safetensors"))
    assert not agree(folder)


@pytest.mark.parametrize("by_config", [True, False], ids=["config ties", "config does not"])
@pytest.mark.parametrize("heads", ["other", "equal", "no head", "no embeddings"])
def test_a_head_is_tied_where_transformers_ties_it(folder, heads, by_config):
    tensors = load_file(folder / "model.safetensors")
    change_config(folder, tie_word_embeddings=by_config)
    if heads == "equal":
        tensors[HEAD] = tensors[EMBEDDINGS].clone()
    elif heads != "other":
        del tensors[HEAD if heads == "no head" else EMBEDDINGS]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if heads.startswith("no") and not by_config:  # transformers makes such weights up
        for call in (open_checkpoint, load_base):
            with pytest.raises(InputError, match=HEAD if heads == "no head" else EMBEDDINGS):
                call(resolve(str(folder)))
    else:
        assert agree(folder) == (by_config and heads != "other")


def test_a_file_of_the_decoder_alone_is_read_under_its_names(folder):
    tensors = load_file(folder / "model.safetensors")
    change_config(folder, tie_word_embeddings=True)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != HEAD}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    assert agree(folder)


@pytest.mark.parametrize("call", [open_checkpoint, load_base], ids=["merging", "training"])
def test_a_shard_that_is_not_there_is_named(folder, call):
    only_shards(folder, load_file(folder / "model.safetensors"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"names 2 files, of which 1 are not there \(model-00002-of-00002.safetensors\)"
    ):
        call(resolve(str(folder)))


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none_is_named(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"index.json: not the index of a checkpoint"):
        open_checkpoint(resolve(str(folder)))


def test_an_index_that_transformers_would_not_read_says_what_it_lacks(folder):
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    names = load_file(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "one.safetensors")})
    )
    with pytest.raises(KeyError, match="metadata"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(InputError, match=r'index.json: lacks "metadata"'):
        open_checkpoint(resolve(str(folder)))


def test_a_whole_model_with_an_adapter_beside_it_is_refused_before_anything_else(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds a whole model and an adapter \(adapter_config.json\).*adapter"):
        resolve(str(folder))


def test_tokens_without_embeddings_are_named_before_the_weights_load(folder):
    tokenizer = load_tokenizer(resolve(str(folder)))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    message = r"1 tokens that the model has no embeddings for \('\[PAD\]' is 258; the last embedding is 257\)"
    with pytest.raises(InputError, match=message):
        load_tokenizer(resolve(str(folder)))
    assert len(load_tokenizer(resolve(str(folder)), spare_tokens=True)) == 259


# ------------------------------------------------------------------------------------------------------- GGUF in shards


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def whole(request, save_tiny_llama, tmp_path_factory):
    """(folder, GGUF file of its model)."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("whole"), tie_word_embeddings=request.param)
    path = tmp_path_factory.mktemp("gguf")
    write_adapter(attach(AutoModelForCausalLM.from_pretrained(folder), r=1, alpha=1), path)
    merge(resolve(str(folder)), path, path / "out", quantization=None, format="gguf", gguf_type="f32", verify=False)
    return folder, path / "out" / "model.gguf"


def split(file, folder, reverse):
    """The same model in shards of four tensors, as llama.cpp's own writer splits it."""
    reader = GGUFReader(str(file))
    writer = Writer(str(folder / "m.gguf"), "llama", split_max_tensors=4)
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kinds = field.types
            writer.add_key_value(key, field.contents(), kinds[0], sub_type=kinds[1] if len(kinds) > 1 else None)
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.name, reverse=reverse):
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("m-*.gguf"))


@pytest.mark.parametrize("reverse", [False, True], ids=["head in the last", "head in the first"])
def test_all_shards_are_read_whichever_tensors_lie_where(whole, tmp_path, reverse):
    folder, file = whole
    shards = split(file, tmp_path, reverse)
    assert len(shards) > 4
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(resolve(str(folder)))
    ids = torch.arange(3, 30)[None]
    for named in (shards[0], shards[2]):
        source = resolve(str(named))
        assert source.gguf_file == shards[0].name
        assert shape_of(source).tie_word_embeddings == expected.config.tie_word_embeddings
        model = load_base(source, load_in_4bit=False, dtype="float32", tokenizer=tokenizer, device="cpu").model
        torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    checkpoint, config = open_checkpoint(source)
    assert config.tie_word_embeddings == expected.config.tie_word_embeddings
    assert checkpoint.files == tuple(shards)
    for name, tensor in expected.named_parameters():
        assert torch.equal(checkpoint.tensor(name), tensor), name


def test_a_shard_of_a_gguf_that_is_not_there_or_has_another_name_is_named(whole, tmp_path):
    shards = split(whole[1], tmp_path, False)
    alone = tmp_path / "alone.gguf"
    shutil.copy(shards[1], alone)
    with pytest.raises(InputError, match=rf"alone.gguf: file 2 of {len(shards)} of a split model by its metadata"):
        open_checkpoint(resolve(str(alone)))
    shards[1].unlink()
    with pytest.raises(InputError, match=rf"one of {len(shards)} files of a split model, of which 1 are not there"):
        resolve(str(shards[0]))


def test_a_tensor_that_has_no_place_is_not_left_out_in_silence(whole, tmp_path):
    reader = GGUFReader(str(whole[1]))
    writer = Writer(str(tmp_path / "m.gguf"), "llama")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kinds = field.types
            writer.add_key_value(key, field.contents(), kinds[0], sub_type=kinds[1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.add_tensor("blk.0.attn_q_norm.weight", torch.ones(16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"holds blk.0.attn_q_norm.weight, which a llama model has no place for"):
        open_checkpoint(resolve(str(tmp_path / "m.gguf")))
