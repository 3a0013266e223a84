"""The beginning of a run: the base is loaded, the adapter put on it, the folder opened, the ranks pointed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import set_seed

from qalora import processes
from qalora.adapter.callback import AllocationCallback
from qalora.adapter.model import attach, load_adapter, ranks, settle_scalings
from qalora.adapter.provenance import Provenance
from qalora.adapter.replicas import check_given, check_replicas
from qalora.base.loading import LoadedBase, load_base
from qalora.data.chat_template import chat_template
from qalora.data.ending import taught_ends
from qalora.data.prompts import served_prompt
from qalora.files import write_json, write_json_lines, write_whole
from qalora.metrics import predict
from qalora.results.facts import with_command
from qalora.training.agreement import check_bases, check_folder
from qalora.training.callbacks import InterruptCallback
from qalora.training.identity import Identity
from qalora.training.resume import check_base
from qalora.training.run import Run
from qalora.training.run_folder import begin_folder, is_finished
from qalora.training.trainer import QaloraTrainer, begin_ranks, build_trainer

Say = Callable[[str], None]


@dataclass
class Session:
    """What a run has at hand while it trains.

    Attributes:
        start: full module name → its ranks at the start of the run, whose sum is the budget.
        metrics: what metrics.json holds.
        finished: what it held of a run that had been trained to its end already.
    """

    base: LoadedBase
    model: PeftModel
    provenance: Provenance
    start: dict[str, int]
    trainer: QaloraTrainer = field(init=False)
    allocator: AllocationCallback = field(init=False)
    interrupt: InterruptCallback = field(init=False)
    metrics: dict[str, Any] = field(default_factory=dict)
    finished: dict[str, Any] = field(default_factory=dict)


def begin(run: Run, say: Say, warn: Say) -> Session:
    """Loads the base and gets everything ready for the first step, the evaluation before training included.

    Args:
        say, warn: told what happens; `warn` what even a quiet run says.

    Raises:
        InputError: the base is not the one that the checkpoint was made with.
    """
    base = load_base(run.source, tokenizer=run.tokenizer, **run.recipe.quantization.loading())
    provenance = provenance_of(run, base)
    weights = provenance.base  # downloaded by now
    check_bases(weights)
    if run.weights is None and run.continued is not None:
        check_base(weights, run.recipe.model, run.continued.identity, run.continued.checkpoint)
    say(_end_line(provenance))

    set_seed(run.recipe.training.seed)
    model, start = first_model(run, base)
    session = Session(base, model, provenance, start)
    if run.continued is not None and run.continued.step >= run.total_steps:
        session.finished = processes.from_first(lambda: figures_of(run.output_dir))
    with processes.agreeing():
        if processes.is_first():
            open_folder(run, weights, start, warn)
    check_folder(run.output_dir)
    measure_before(run, session, say)
    session.trainer, session.allocator, session.interrupt = build_trainer(
        run.recipe,
        model,
        run.tokenizer,
        rows=run.data.train.items,
        train=run.items,
        validation=run.data.validation.items,
        scoring=run.data.scoring.items,
        rounds=run.rounds,
        total_steps=run.total_steps,
        compute_dtype=base.compute_dtype,
        output_dir=run.output_dir,
        other_rows=run.other_rows,
        other_validation=run.other_validation,
        provenance=provenance,
    )
    if run.continued is None and not run.recipe.lora.adapter:
        begin_ranks(run.recipe, session.trainer, session.allocator, run.data.train.items, run.original)
    check_replicas(model, None, "before the first step")
    return session


def first_model(run: Run, base: LoadedBase) -> tuple[PeftModel, dict[str, int]]:
    """(the base with the adapter that training goes on with, full module name → its ranks at the start of the run)."""
    lora, continued = run.recipe.lora, run.continued
    if continued is not None and continued.identity is not None:
        return load_adapter(base.model, continued.checkpoint, trainable=True), continued.identity.ranks
    if continued is None and lora.adapter:
        model = load_adapter(base.model, Path(lora.adapter).expanduser(), trainable=True, dropout=lora.dropout)
        check_given(model)
        if run.rounds.steps:
            settle_scalings(model)
        return model, ranks(model)
    model = attach(
        base.model,
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        layers_to_transform=lora.layers_to_transform,
        seed=run.recipe.training.seed,
    )
    start = ranks(model)
    if continued is not None:  # of an earlier version, whose checkpoints do not say how the run began
        model = load_adapter(model.unload(), continued.checkpoint, trainable=True)
    return model, start


def open_folder(run: Run, weights: str | None, start: dict[str, int], warn: Say) -> None:
    """Clears the folder of an earlier run, and writes what this one is made of."""
    begin_folder(run.output_dir, run.checkpoint, warn)
    begun = None if run.continued is None else run.continued.identity
    known = {} if begun is None else {"run": begun.run}
    rounds = run.recipe.allocation.rounds_in(run.total_steps)
    Identity(run.recipe.model, weights, run.total_steps, rounds, start, run.data.rows, **known).write(run.output_dir)
    write_whole(run.output_dir / "recipe.yaml", with_command(run.recipe.to_yaml(), run.command))


def measure_before(run: Run, session: Session, say: Say) -> None:
    """The evaluation before training, unless the run that is continued has made it, on the same rows."""
    file = run.output_dir / "metrics.json"
    known = processes.from_first(lambda: file.read_text(encoding="utf-8") if file.is_file() else None)
    if run.continued is not None and known is not None:
        session.metrics = json.loads(known)
        if run.other_validation:
            session.metrics.pop("before", None)
    elif run.recipe.evaluation.before:
        measure(run, session, "before", say)


def measure(run: Run, session: Session, when: str, say: Say) -> None:
    """Figures for metrics.json; the answers behind them for people to read, as far as there are any."""
    settings = run.recipe.evaluation
    figures, predictions = predict(
        session.model,
        run.tokenizer,
        run.data.validation,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        progress=not run.recipe.logging.quiet,
        taught=session.provenance.stop_tokens,
        **settings.asking(),
    )
    session.metrics[when] = figures
    if not processes.is_first():
        return
    say(f"{when + ':':7} " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    write_json(run.output_dir / "metrics.json", session.metrics)
    if any("answer" in line for line in predictions):
        write_json_lines(run.output_dir / f"predictions-{when}.jsonl", predictions)


def provenance_of(run: Run, base: LoadedBase) -> Provenance:
    """What the run's adapters say of themselves: the base as it was loaded, and what these rows teach."""
    data, train = run.recipe.data, run.data.train
    built_in = chat_template(base.tokenizer).default if any(example.chat for example in train.examples) else None
    given = data.chat_template or data.chat_template_kwargs  # the template is the recipe's, and not the base's own
    return replace(
        base.provenance(run.weights),
        stop_tokens=taught_ends(train, base.tokenizer),
        chat_template=base.tokenizer.get_chat_template() if given else built_in,
        prompt=served_prompt(train.examples, data.prompt_template),
    )


def figures_of(output_dir: Path) -> dict[str, Any]:
    """What metrics.json says of a run that has been trained to its end; nothing where it was not."""
    try:
        figures = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return figures if isinstance(figures, dict) and is_finished(output_dir) else {}


def _end_line(provenance: Provenance) -> str:
    if ends := ", ".join(map(repr, provenance.stop_tokens)):
        return f"what ends an answer, as these rows teach it: {ends}"
    return "these rows teach nothing that ends an answer: a model trained on them stops at max_new_tokens alone"
