"""Whether a base is quantized when it is loaded: not where it is merged already, unless an adapter saw it so."""

from __future__ import annotations

from qalora.base.precision import is_merged, loaded_in_4bit
from qalora.base.registry import ModelSource


def test_a_merged_folder_is_taken_as_it_is_unless_an_adapter_was_trained_on_it(tmp_path):
    plain = ModelSource("m", "folder", str(tmp_path))
    assert not is_merged(plain) and loaded_in_4bit(plain, True, trained_on=False) == (True, None)
    (tmp_path / "merge.json").write_text("{}")
    assert is_merged(plain)
    asked, line = loaded_in_4bit(plain, True, trained_on=False)
    assert not asked and line == "--model m: a merged model, taken as it is: not quantized again"
    asked, line = loaded_in_4bit(plain, True, trained_on=True)
    assert asked and "(merged) are quantized again, to 4 bits" in line
    assert loaded_in_4bit(plain, False, trained_on=True) == (False, None)


def test_a_base_on_the_hub_is_never_a_merged_folder_of_ours():
    assert not is_merged(ModelSource("o/m", "hub", "o/m"))
