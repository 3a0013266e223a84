"""Training itself, and the end of a run: figures, adapter, pictures, page, and what the recipe asks for besides."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qalora import processes
from qalora.adapter.allocation_round import Record
from qalora.adapter.compression import MOST_ROWS, enough_rows, scoring_rows
from qalora.adapter.model import ranks, save_adapter
from qalora.adapter.search import Asked
from qalora.base.checkpoint import Quantization
from qalora.base.device import device_kind
from qalora.base.registry import shape_of
from qalora.data.batching import Collator, micro_batches, on_device
from qalora.data.rows import Tokenized, supervised_tokens
from qalora.deploy.compressed import Rows, cut_model
from qalora.deploy.compressed import draw as draw_cut
from qalora.deploy.merging import merge
from qalora.errors import AnswerNo
from qalora.files import write_json
from qalora.pictures import draw_loss, draw_ranks
from qalora.results.compression import COMPRESSION, PICTURE, in_sentences
from qalora.results.finish import push_run, write_results
from qalora.training.begin import Say, Session, measure
from qalora.training.planning import planner
from qalora.training.rows import RunData
from qalora.training.run import Run

ENOUGH_APART = 64  # rows held back that do nothing else: from there on they alone decide on a cut


def train(run: Run, session: Session, say: Say) -> bool:
    """Trains to the end. False: interrupted, after a checkpoint.

    Raises:
        AnswerNo: the loss was not finite, or a run that was to allocate never did.
    """
    trainer = session.trainer
    with processes.in_sums():
        trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
    step = trainer.state.global_step
    if processes.any_of(session.interrupt.signal is not None):
        say(f"interrupted after step {step}; continue with the same command and --resume-from-checkpoint auto")
        return False
    if run.rounds.steps and not session.allocator.done():
        raise AnswerNo(
            f"the run ended after step {step}, before its first round of allocation (step {run.rounds.steps[0]}); "
            "lower allocation.warmup or raise training.early_stopping_patience."
        )
    return True


def finish(run: Run, session: Session, say: Say, warn: Say) -> None:
    """Writes metrics.json, the adapter, its pictures, card and page, and merges and pushes where that was asked for; of
    several processes one writes, and all measure."""
    session.metrics.update(figures(run, session, ranks(session.model)))
    if run.recipe.lora.compress:
        compress_run(run, session, say)
    final = ranks(session.model)
    if processes.is_first():
        save_adapter(session.model, run.output_dir / "adapter", session.provenance)
    if run.recipe.evaluation.after:
        measure(run, session, "after", say)
    if processes.is_first():
        write_up(run, session, final, say, warn)


def write_up(run: Run, session: Session, final: dict[str, int], say: Say, warn: Say) -> None:
    """What is written when everything has been measured.

    Args:
        final: full module name → its ranks.
    """
    write_json(run.output_dir / "metrics.json", session.metrics)
    log = session.trainer.state.log_history
    draw(run.output_dir, log, session.start, final, session.allocator.history)
    write_results(run.output_dir, log, warn)
    if run.recipe.merge:
        merge_run(run, session)
    total, budget = sum(final.values()), sum(session.start.values())
    say(f"{run.output_dir}/adapter: a plain PEFT LoRA, total rank {total} of {budget}")
    if repo := run.recipe.repository():
        push_run(run.output_dir, repo, run.recipe.hub_private_repo, say)


def compress_run(run: Run, session: Session, say: Say) -> None:
    """`lora.compress=true`: cuts the best weights to the smallest size that costs nothing. metrics.json has the whole
    adapter beside what was kept, and compress.json the curves."""
    scoring, judging, also = rows_to_compress_by(run.data, session.trainer.args.load_best_model_at_end)
    which = (
        f"which also {also}: fewer than {ENOUGH_APART} rows are left beside them"
        if also
        else "none of which chose the weights or measures the result"
    )
    say(f"compressing: {len(scoring)} validation rows order the ranks and {len(judging)} judge the cut, {which}")
    collate, device = Collator(run.tokenizer.pad_token_id), session.base.model.device
    sizes = (run.recipe.training.micro_batch_size, run.recipe.evaluation.batch_size)
    parts = zip((scoring, judging), sizes, strict=True)
    ordering, deciding = (on_device(micro_batches(part, size, collate), device) for part, size in parts)
    report = cut_model(session.model, Asked(), Rows(ordering, deciding, also))
    session.metrics["compression"] = {name: of for name, of in report.items() if name not in ("curves", "ranks")}
    for line in in_sentences(report):
        say(line)
    if processes.is_first():
        write_json(run.output_dir / COMPRESSION, report)
        with TemporaryDirectory(dir=run.output_dir, prefix=".drawing-") as drawn:
            draw_cut(report, session.start, Path(drawn) / PICTURE)
            (Path(drawn) / PICTURE).replace(run.output_dir / PICTURE)


def rows_to_compress_by(data: RunData, chose: bool) -> tuple[list[Tokenized], list[Tokenized], str]:
    """(rows that order the ranks, other rows that judge the cut, what else they decide): some of the rows held back,
    and of those that chose no weights and measure nothing, where they are enough.

    Args:
        chose: the loss on the other ones chose the weights.
    """
    if len(data.apart) >= ENOUGH_APART:
        rows, also = data.apart.items, ""
    else:
        rows = [*data.validation.items, *data.apart.items]
        also = "chose the weights and measure the result" if chose else "measure the result"
    rows = random.Random(0).sample(rows, min(MOST_ROWS, len(rows)))
    tokens = [supervised_tokens([item["labels"]]) for item in rows]
    scoring, judging = scoring_rows(tokens[: enough_rows(tokens)])
    return [rows[i] for i in scoring], [rows[i] for i in judging], also


def figures(run: Run, session: Session, final: Mapping[str, int]) -> dict[str, Any]:
    """What metrics.json says of training, allocation and memory.

    Args:
        final: full module name → its ranks.
    """
    trainer, allocator = session.trainer, session.allocator
    first_step = 0 if run.continued is None else run.continued.step
    rounds = [record for record in allocator.history if run.continued is None or record["step"] > first_step]
    seconds = sum(record["seconds"] for record in rounds)
    summary = trainer.throughput.summary(trainer.state.global_step)
    allocation = {
        "rounds": allocator.done(),
        "seconds": seconds,
        "share": seconds / summary["seconds"],
        "budget": sum(session.start.values()),
        "total_rank": sum(final.values()),
    }
    return {
        "train": session.finished.get("train", summary),
        "allocation": session.finished.get("allocation") or allocation,
        "plan": planned(run, session.start),
    }


def planned(run: Run, start: Mapping[str, int]) -> dict[str, Any]:
    """The memory that the run was planned to need on this device, as `qalora plan --json` has it, in bytes.

    Args:
        start: full module name → its ranks at the start.
    """
    longest = run.recipe.data.max_seq_len if run.recipe.data.packing else run.data.longest
    device = device_kind()
    plan = planner(run.recipe, shape_of(run.source), device, ranks=start, processes=processes.size())(seq_len=longest)
    return {"device": device, "seq_len": longest, "terms": plan.terms, "total": plan.total}


def merge_run(run: Run, session: Session) -> None:
    """`merge=true`: the run's adapter in the weights that it was trained on, as `qalora merge` writes them."""
    asked, base = run.recipe.quantization, session.base
    quant_type = asked.bnb_4bit_quant_type if base.quantized else None
    merge(
        base.source,
        run.output_dir / "adapter",
        run.output_dir / "merged",
        quantization=Quantization(quant_type, asked.bnb_4bit_use_double_quant, base.compute_dtype),
        overwrite=True,
    )


def draw(
    output_dir: Path,
    log_history: list[dict[str, Any]],
    start: dict[str, int],
    final: dict[str, int],
    rounds: Sequence[Record],
) -> None:
    """ranks.png and loss.png, whole or not at all."""
    with TemporaryDirectory(dir=output_dir, prefix=".drawing-") as drawn:
        draw_ranks({name: final.get(name, 0) for name in start}, start, Path(drawn) / "ranks.png")
        draw_loss(
            log_history,
            [record["step"] for record in rounds],
            Path(drawn) / "loss.png",
            total_rank={record["step"]: record["total_rank"] for record in rounds} or None,
            budget=sum(start.values()),
        )
        for picture in Path(drawn).iterdir():
            picture.replace(output_dir / picture.name)
