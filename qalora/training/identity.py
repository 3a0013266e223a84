"""What a run is made of, in its folder's run.json: by it a checkpoint knows what it continues. Torch-free."""

from __future__ import annotations

import base64
import hashlib
import json
import uuid
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from qalora.errors import InputError
from qalora.files import write_json

if TYPE_CHECKING:
    from qalora.data.rows import Row

FILE = "run.json"
DIGEST = 8  # bytes of a row's


@dataclass(frozen=True)
class Rows:
    """The tokenized rows of a run.

    Attributes:
        train: digest of each row that is trained on, in order.
        held_back: digest of each row that is kept for validation and scoring, in order.
        validation: digest of all rows that give the validation loss.
    """

    train: tuple[bytes, ...] = ()
    held_back: tuple[bytes, ...] = ()
    validation: str = ""


@dataclass(frozen=True)
class Identity:
    """
    Attributes:
        model: what the user called the base.
        base: fingerprint of its weights (base/fingerprint.py); None: not known.
        steps: optimizer steps of the run as it was last planned.
        rounds: N_A, which a longer run keeps.
        ranks: full module name → ranks at the start, whose sum is the budget.
        run: tells a run from every other one.
    """

    model: str
    base: str | None
    steps: int
    rounds: int
    ranks: dict[str, int]
    rows: Rows
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    def write(self, folder: Path) -> None:
        rows = {"train": _packed(self.rows.train), "held_back": _packed(self.rows.held_back)}
        write_json(folder / FILE, {**asdict(self), "rows": {**rows, "validation": self.rows.validation}})


def read_identity(folder: Path) -> Identity | None:
    """What run.json in a run's folder or checkpoint says; None where there is none, as in folders of earlier versions.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        train, held_back = (_unpacked(values["rows"][name]) for name in ("train", "held_back"))
        rows = Rows(train, held_back, str(values["rows"]["validation"]))
        return Identity(**{f.name: values[f.name] for f in fields(Identity) if f.name != "rows"}, rows=rows)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: not what qalora wrote of a run ({error}).") from None


def row_digests(items: Sequence[Row]) -> tuple[bytes, ...]:
    """Of each tokenized row (input_ids, labels): rows of the same tokens and labels have the same."""

    def digest(item: Row) -> bytes:
        numbers = array("q", [*item["input_ids"], *item["labels"]])
        return hashlib.blake2b(numbers.tobytes(), digest_size=DIGEST).digest()

    return tuple(map(digest, items))


def rows_of(train: Sequence[Row], held_back: Sequence[Row], validation: Sequence[Row]) -> Rows:
    """The `Rows` of tokenized rows."""
    measured = hashlib.sha256(b"".join(row_digests(validation))).hexdigest()
    return Rows(row_digests(train), row_digests(held_back), measured)


def _packed(digests: Sequence[bytes]) -> str:
    return base64.b64encode(b"".join(digests)).decode()


def _unpacked(text: str) -> tuple[bytes, ...]:
    joined = base64.b64decode(text)
    return tuple(joined[i : i + DIGEST] for i in range(0, len(joined), DIGEST))
