"""What an adapter's folder says of its training is read as it was written."""

from __future__ import annotations

import pytest

from qalora.adapter.provenance import FILE, Provenance, read_provenance
from qalora.errors import InputError

NOTE = Provenance("m", "nf4", True, "bfloat16", stop_tokens=("<|im_end|>",), chat_template="{{ messages }}", base="f")


def test_it_is_read_as_it_was_written_with_the_template_beside_it(tmp_path):
    NOTE.write(tmp_path)
    assert read_provenance(tmp_path) == NOTE
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_folder_without_one_says_nothing_and_a_damaged_one_is_named(tmp_path):
    assert read_provenance(tmp_path) is None
    (tmp_path / FILE).write_text("{")
    with pytest.raises(InputError, match=FILE):
        read_provenance(tmp_path)


def test_fields_of_a_later_version_are_passed_over(tmp_path):
    NOTE.write(tmp_path)
    text = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(text.replace("{", '{"newer": 1,', 1))
    assert read_provenance(tmp_path) == NOTE
