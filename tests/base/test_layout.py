"""How the files of one model lie."""

from __future__ import annotations

import pytest

from qalora.base.layout import refuse_adapter_beside, shards_of
from qalora.errors import InputError


def test_any_shard_names_all_of_them_in_order_and_another_file_itself(tmp_path):
    names = [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for name in names:
        (tmp_path / name).touch()
    assert [[file.name for file in shards_of(tmp_path / name)] for name in names] == [names] * 3
    assert shards_of(tmp_path / "m.gguf") == [tmp_path / "m.gguf"]


def test_a_shard_that_is_missing_is_named(tmp_path):
    (tmp_path / "m-00002-of-00002.gguf").touch()
    with pytest.raises(InputError, match=r"of which 1 are not there \(m-00001-of-00002\.gguf\)"):
        shards_of(tmp_path / "m-00002-of-00002.gguf")


def test_an_adapter_beside_a_whole_model_is_refused(tmp_path):
    refuse_adapter_beside(tmp_path, "m")
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(InputError, match="holds a whole model and an adapter"):
        refuse_adapter_beside(tmp_path, "m")
