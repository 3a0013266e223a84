"""What a value given from Python may be. Torch-free; recipes and flags are checked by their own types."""

from __future__ import annotations

from qalora.errors import InputError


def whole(name: str, value: object, least: int = 1, *, optional: bool = False) -> None:
    """
    Args:
        name: of the parameter.
        least: the lowest integer that it takes.
        optional: None is taken too.

    Raises:
        InputError: a value that is no integer, or a lower one.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}={value!r}: takes an integer from {least} on{', or None' if optional else ''}.")
