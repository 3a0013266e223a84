"""Is the base that an adapter is put on the one that it was trained on? By fingerprints of the files where the adapter
has one, else by names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora.adapter.provenance import read_provenance
from qalora.adapter.saved import check_adapter
from qalora.base.fingerprint import fingerprint, stored_as
from qalora.base.precision import MERGED, is_merged, loaded_in_4bit
from qalora.base.registry import ModelSource, published_fields, read_fields, resolve
from qalora.base.weight_files import base_folder
from qalora.errors import InputError


@dataclass(frozen=True)
class OtherBase:
    """
    Attributes:
        said: one sentence, without an end, on what the adapter was trained on and what is given.
        certain: the files have other weights; False: only the names differ, or the forms that the weights are stored
            in.
    """

    said: str
    certain: bool

    @property
    def line(self) -> str:
        return self.said if self.certain else f"{self.said}; right only if both are the same model"


def other_base(adapter: str | Path, source: ModelSource) -> OtherBase | None:
    """None: it is the same, whatever it is called and wherever it lies now, or the adapter says nothing of its base.

    Raises:
        InputError: a base that cannot be had, or files that are damaged.
    """
    if _merged_already(Path(adapter), source):
        return OtherBase(f"{adapter}: is in --model {source.name} already, which `qalora merge` made of it", True)
    known = read_provenance(adapter)
    named = known.model if known else read_fields(Path(adapter) / "adapter_config.json").get("base_model_name_or_path")
    if not named:
        return None
    trained = f"{adapter}: was trained on {named}"
    if known is None or known.base is None:
        return (
            None if _same_by_name(str(named), source) else OtherBase(f"{trained}, and --model is {source.name}", False)
        )
    base_folder(source)  # downloads one that is not here yet, as loading will
    now, form = fingerprint(source), stored_as(source)
    if now in (None, known.base):
        return None
    if form != known.stored_as:
        return OtherBase(
            f"{trained} (stored as {known.stored_as}), and --model is {source.name} (stored as {form})", False
        )
    return OtherBase(
        f"{trained} (weights {known.base[:12]}), and --model {source.name} has other weights ({str(now)[:12]})", True
    )


def said_of_base(adapter: str | Path, source: ModelSource) -> str | None:
    """A line where the base is another one, or may be; None where it is the one."""
    found = other_base(adapter, source)
    return None if found is None else found.line


def refuse_other_base(adapter: str | Path, source: ModelSource) -> str | None:
    """A line where it may be another base.

    Raises:
        InputError: it is another one.
    """
    found = other_base(adapter, source)
    if found is not None and found.certain:
        raise InputError(
            f"{found.said}; pass the model that it was trained on. To put it on this one all the same, copy its folder "
            "without qalora.json."
        )
    return None if found is None else found.line


def loading_as_trained(
    adapter: str | Path, source: ModelSource, loading: Mapping[str, object], given: Collection[str] = ()
) -> tuple[dict[str, Any], str | None]:
    """Keyword arguments of `load_base`, with the base quantized as it was when the adapter was trained, and a line
    where that is not the default, or where another was asked for.

    Args:
        given: names of the arguments that the user gave, which stay.
    """
    known = read_provenance(adapter)
    if known is None:
        return dict(loading), None
    trained: dict[str, Any] = {"load_in_4bit": known.quant_type is not None}
    if known.quant_type is not None:
        trained |= {"quant_type": known.quant_type, "double_quant": known.double_quant}
    result: dict[str, Any] = dict(loading)
    if "load_in_4bit" not in given and not published_fields(source).get("quantization_config"):
        result |= {name: value for name, value in trained.items() if name not in given}
    if result["load_in_4bit"] != trained["load_in_4bit"]:
        then, now = ("in 4 bits", "is not") if trained["load_in_4bit"] else ("that was not quantized", "is in 4 bits")
        return result, f"{adapter}: was trained on a base {then}, and this one {now}"
    if loading["load_in_4bit"] and not result["load_in_4bit"]:
        return result, f"{adapter}: was trained on a base that was not quantized, so this one is not either"
    for name in ("quant_type", "double_quant") if result["load_in_4bit"] else ():
        if result[name] != trained[name]:
            return result, f"{adapter}: was trained with {name}={trained[name]}, and this base has {result[name]}"
    return result, None


def how_to_load(
    source: ModelSource, adapter: str | Path | None, loading: Mapping[str, Any], given: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Keyword arguments of `load_base` for a base that an adapter, or nothing, is put on, and lines for the user.

    Args:
        adapter: its folder; None: the base alone.
        loading: what the settings say.
        given: names of those that the user gave, which stay.

    Raises:
        InputError: no plain LoRA, or one that does not fit the base.
    """
    loading, notes = dict(loading), list[str | None]()
    if adapter is not None:
        check_adapter(adapter, source)
        notes.append(said_of_base(adapter, source))
        loading, note = loading_as_trained(adapter, source, loading, given)
        notes.append(note)
    in_4bit, note = loaded_in_4bit(source, loading["load_in_4bit"], trained_on=adapter is not None)
    return {**loading, "load_in_4bit": in_4bit}, [line for line in (*notes, note) if line]


def _merged_already(adapter: Path, source: ModelSource) -> bool:
    return is_merged(source) and read_fields(Path(source.location) / MERGED).get("adapter") == str(adapter.resolve())


def _same_by_name(named: str, source: ModelSource) -> bool:
    place, location = Path(named).expanduser(), Path(source.location)
    if named in (source.name, source.hub_id, source.location):
        return True
    if (
        not place.exists()
    ):  # a Hub id, which may lie here in a folder of its name or in the Hub's cache, or a path of another machine
        names = {Path(source.name).name, Path(source.hub_id or "").name, location.resolve().name}
        return place.name.lower() in map(str.lower, names) or f"models--{named.replace('/', '--')}" in location.parts
    if place.resolve() == Path(source.location).resolve():
        return True
    try:
        there = fingerprint(resolve(named))
    except InputError:  # no model there any more
        return False
    return there is not None and there == fingerprint(source)
