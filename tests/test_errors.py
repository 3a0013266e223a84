"""Errors name flags where a command prints them, and parameters in Python."""

from __future__ import annotations

import pytest

from qalora.errors import AnswerNo, InputError, check_choice, short


@pytest.mark.parametrize(
    ("typed", "in_python"),
    [
        ("--max-rank 8: too many", "max_rank 8: too many"),
        ("pass --model or --no-quantize", "pass model or no_quantize"),
        ("run `qalora merge --model x` or pass --model", "run `qalora merge --model x` or pass model"),
        ("a--b is no flag", "a--b is no flag"),
    ],
)
def test_flags_are_parameters_but_in_commands(typed, in_python):
    error = InputError(typed)
    assert (str(error), error.as_typed) == (in_python, typed)


def test_bad_input_is_a_value_error_and_a_no_is_not():
    assert issubclass(InputError, ValueError) and not issubclass(AnswerNo, ValueError)


def test_a_choice_that_is_none_is_told_with_those_there_are():
    check_choice("budget", None, (None, "ranks"))
    with pytest.raises(InputError, match=r"^budget='all': choose one of None, 'ranks'\.$"):
        check_choice("budget", "all", (None, "ranks"))


def test_what_an_error_says_is_one_line_and_not_cut_without_a_mark():
    assert short(ValueError("two\n  lines")) == "two lines"
    assert short("x" * 200) == "x" * 200
    assert short("x" * 201) == "x" * 198 + " …"
