"""What an adapter was trained on and taught, in a file of its own beside PEFT's two. Torch-free.

PEFT's config has no place for the precision of the base, for the tokens that end a turn, or for a chat template that
the base's tokenizer lacks; and keys that it does not know get a warning from it. Whoever copies the adapter's folder
copies this along.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from qalora.errors import InputError
from qalora.files import write_json, write_whole

FILE = "qalora.json"


@dataclass(frozen=True)
class Provenance:
    """
    Attributes:
        model: the base, as `--model` named it, or its Hub id.
        quant_type: nf4 or fp4; None: the base was not quantized.
        double_quant: whether the constants of the 4-bit blocks were quantized too.
        compute_dtype: bfloat16, float16 or float32: the base was quantized from it and computed in it.
        stop_tokens: texts of the tokens that the run taught to end an answer, the likeliest first.
        chat_template: the one that rows were rendered with, where the base's tokenizer has none; None: the tokenizer's
            own, or none.
        prompt: the text around what a user says, {prompt}, in rows that are no chats; None: a chat, or a prompt of
            several columns.
        base: fingerprint of the base (base/fingerprint.py); None: not known.
        stored_as: the form that the base's files have its weights in; two forms of one model have two fingerprints.
    """

    model: str
    quant_type: str | None
    double_quant: bool
    compute_dtype: str
    stop_tokens: tuple[str, ...] = ()
    chat_template: str | None = None
    prompt: str | None = None
    base: str | None = None
    stored_as: str | None = None

    def write(self, folder: str | Path) -> None:
        """Writes the file, and a chat template in one of its own too, which servers of an adapter can be given."""
        write_json(Path(folder) / FILE, asdict(self))
        if self.chat_template is not None:
            write_whole(Path(folder) / "chat_template.jinja", self.chat_template)


def read_provenance(folder: str | Path) -> Provenance | None:
    """What the adapter's folder says of its training; None where it says nothing, as PEFT's own do.

    Raises:
        InputError: the file is there and damaged.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        known = {field.name: values[field.name] for field in fields(Provenance) if field.name in values}
        return Provenance(**{**known, "stop_tokens": tuple(known.get("stop_tokens", ()))})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: not what qalora wrote of an adapter ({error}); copy the folder again.") from None
