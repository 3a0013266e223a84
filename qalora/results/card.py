"""Model cards: README.md of an adapter or a merged folder, made of what the files beside it say, and nothing else.
Torch-free.

adapter_config.json, qalora.json ─ base, precision, what ends an answer ┐
the run around the adapter ─ rows, steps, figures, ranks, command ──────┼─ metadata for the Hub + sections
merge.json ─ what was merged, and how far it was verified ──────────────┘
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qalora import __version__
from qalora.adapter.given import given_adapter
from qalora.adapter.provenance import Provenance, read_provenance
from qalora.base.registry import read_fields
from qalora.errors import InputError
from qalora.results.card_sections import (
    HERE,
    Base,
    again,
    base_called,
    figures,
    link,
    loading_adapter,
    loading_gguf,
    loading_merged,
    made_by,
    merge_figures,
    rank_map,
    training,
)
from qalora.results.compression import COMPRESSION, section
from qalora.results.facts import RunFacts, hub_ids, run_of

MERGE = "merge.json"
# As Hugging Face's registry of metrics calls them.
HUB_METRICS = {"perplexity": "perplexity", "exact_match": "exact_match", "accuracy": "accuracy", "rougeL": "rouge"}


def adapter_card(folder: str | Path, run: RunFacts | None = None, title: str | None = None) -> str:
    """The card of a plain PEFT LoRA.

    Args:
        run: that made it; None: the one that the folder lies in, if any.
        title: where there is no run (default: the name of the folder).

    Raises:
        InputError: no plain LoRA there.
    """
    path = Path(folder)
    run = run or run_of(path)
    provenance = read_provenance(path)
    config = read_fields(path / "adapter_config.json")
    report = _report(path)
    base = base_called(
        provenance.model if provenance else None, config.get("base_model_name_or_path"), report.get("model")
    )
    cut_later = _read(path / COMPRESSION)
    cut = cut_later or (run.metrics.get("compression", {}) if run else {})
    ranks = given_adapter(path).ranks
    article = f"A LoRA adapter{f' for {link(base)}' if base else ''}"
    made = made_by(run, provenance)
    return _joined(
        _metadata(base, run, library="peft", relation="adapter", tags=["lora", "qalora"] if made else ["lora"]),
        f"# {run.name if run else title or _title(path)}",
        f"{article}, {made}." if made else f"{article}.",
        figures(run),
        training(base, run, provenance, config),
        section(cut, later=bool(cut_later) and run is not None),
        rank_map(ranks, run),
        merge_figures(report),
        loading_adapter(base, provenance),
        again(run),
    )


def merged_card(folder: str | Path, adapter: str | Path | None = None, title: str | None = None) -> str:
    """The card of a merged folder, in either format.

    Args:
        adapter: that was merged (default: where merge.json says it lies).
        title: where there is no run (default: the name of the folder).
    """
    path = Path(folder)
    report = _report(path)
    where, run, provenance = _origin(adapter or report.get("adapter"))
    base = base_called(provenance.model if provenance else None, report.get("model"))
    gguf = any(path.glob("*.gguf"))
    ranks = given_adapter(where).ranks if where else {}
    tags = ["gguf", "qalora"] if gguf else ["qalora"]
    return _joined(
        _metadata(base, run, library=None if gguf else "transformers", relation="finetune", tags=tags),
        f"# {run.name if run else title or _title(path)}",
        f"{link(base) if base else 'A model'} with a LoRA adapter merged into its weights"
        + (f", {made_by(run, provenance)}." if run or provenance else "."),
        figures(run),
        training(base, run, provenance, {}),
        rank_map(ranks, run),
        merge_figures(report),
        loading_gguf(path) if gguf else loading_merged(report),
        again(run),
    )


def exported_card(folder: str | Path, adapter: str | Path | None = None, title: str | None = None) -> str:
    """The card of an adapter in another form: PEFT's with one rank, or GGUF.

    Args:
        adapter: that was exported (default: where merge.json says it lies).
        title: where there is no run (default: the name of the folder).
    """
    path = Path(folder)
    report = _report(path)
    where, run, provenance = _origin(adapter or report.get("adapter"))
    if (path / "adapter_config.json").is_file():
        return adapter_card(path, run, title)
    base = base_called(provenance.model if provenance else None, report.get("model"))
    made = made_by(run, provenance)
    return _joined(
        _metadata(base, run, library=None, relation="adapter", tags=["gguf", "lora", "qalora"]),
        f"# {run.name if run else title or _title(path)}",
        f"A LoRA adapter in GGUF{f' for {link(base)}' if base else ''}{f', {made}' if made else ''}.",
        figures(run),
        training(base, run, provenance, {}),
        rank_map(given_adapter(where).ranks if where else {}, run),
        merge_figures(report),
        f"## Load\n\n```bash\nllama-cli -m BASE.gguf --lora {HERE}/adapter.gguf\n```",
        again(run),
    )


def card_of(folder: str | Path) -> str:
    """The card of an adapter or of a merged folder.

    Raises:
        InputError: a file of it cannot be read, or it is a PEFT adapter of which there is nothing to say.
    """
    path = Path(folder)
    if (path / "adapter_config.json").is_file():
        return exported_card(path)
    return exported_card(path) if _report(path).get("format") == "gguf-lora" else merged_card(path)


def _origin(adapter: str | Path | None) -> tuple[Path | None, RunFacts | None, Provenance | None]:
    """(the folder of an adapter where it is there, the run that made it, what it says of its training)."""
    if adapter is None or not (Path(adapter) / "adapter_config.json").is_file():
        return None, None, None
    return Path(adapter), run_of(adapter), read_provenance(adapter)


def _metadata(base: Base | None, run: RunFacts | None, *, library: str | None, relation: str, tags: list[str]) -> str:
    from huggingface_hub import ModelCardData

    asked = (run.recipe.get("evaluation") or {}).get("metrics", []) if run else []
    measured = [HUB_METRICS["perplexity"]] if "loss" in asked else []
    data = ModelCardData(
        library_name=library,
        base_model=base.name if base and base.hub else None,
        base_model_relation=relation if base and base.hub else None,
        datasets=(hub_ids((run.recipe.get("data") or {}).get("train")) or None) if run else None,
        metrics=[*measured, *(HUB_METRICS[name] for name in asked if name in HUB_METRICS)] or None,
        pipeline_tag="text-generation",
        tags=tags,
    )
    return f"---\n{data.to_yaml()}\n---"


def _report(folder: Path) -> dict[str, Any]:
    return _read(folder / MERGE)


def _read(file: Path) -> dict[str, Any]:
    """What a command wrote of a folder; nothing where the file is not there."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError:
        command = "merge" if file.name == MERGE else "compress"
        raise InputError(f"{file}: not what a {command} wrote; {command} again.") from None
    return found if isinstance(found, dict) else {}


def _title(folder: Path) -> str:
    path = folder.resolve()
    return path.parent.name if path.name in ("adapter", "merged") else path.name


def _joined(*sections: str) -> str:
    written = f"This card was written by qalora {__version__}."
    return "\n\n".join(section for section in (*sections, written) if section) + "\n"
