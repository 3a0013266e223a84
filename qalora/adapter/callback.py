"""When ranks move in a run under transformers' Trainer; how they are scored and moved stands in allocation_round.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from peft import PeftModel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qalora.adapter.ablation import MicroBatch
from qalora.adapter.allocation import Schedule, parse_duration, schedule
from qalora.adapter.allocation_round import Record, RoundSettings, Scorer, Scoring, allocation_round
from qalora.adapter.model import check_adapted, check_own, gated_layers, rank_parameters, ranks, to_fp32
from qalora.adapter.scores import Importance, RankScores
from qalora.arguments import whole
from qalora.base.quantized import linear_maps
from qalora.data.batching import Collator, micro_batches, on_device
from qalora.data.rows import IGNORE, Row
from qalora.errors import AnswerNo, InputError, check_choice
from qalora.files import write_whole

T = TypeVar("T")
Attempt = Callable[[Sequence[Any], Callable[[Sequence[Any]], T]], T]  # (micro-batches, work on them) → its result
HISTORY = "allocation.jsonl"
Budget = Literal["ranks", "parameters"]


def once(batch: Sequence[MicroBatch], work: Callable[[Sequence[MicroBatch]], T]) -> T:
    """`work` on the batch."""
    return work(batch)


class AllocationCallback(TrainerCallback):
    """Rounds of Algorithm 1 (ALoRA, arXiv 2403.16187, §3.3): after some optimizer steps the ranks are scored on `rows`,
    the least important leave, and modules that lost none are given theirs, never above the budget that the adapter
    began with.

    It wires itself when training begins, under `transformers.Trainer` or a subclass such as TRL's SFTTrainer: from the
    model, the number of steps, and the trainer's arguments. A round falls at the end of a step, so that the log line,
    the validation and the checkpoint of that step see the new ranks. Its record is `allocation.jsonl` in the trainer's
    output folder, with the scores beside it. To load the best checkpoint, or to resume, across a round, give the
    trainer `VariableRanks` as a mixin.

    Args:
        rows: B_val, the rows that score the ranks and that training does not see: `input_ids` and `labels` (−100 where
            no loss), a list of integers each.
        rounds: N_A, at most.
        warmup: K1, before the first round: optimizer steps (20), a share of the run (0.3), or epochs ("1 epoch").
        interval: K2, between rounds, likewise.
        prune_per_round: n_A, ranks; None: one per module.
        scoring: how ranks are scored, see `score_ranks`; auto: certified as far as 3 % of the training so far allow.
        importance: which score decides; None: path for scoring="path", else the paper's eq. 6.
        min_rank: ranks that every module keeps.
        max_rank: ranks that no module exceeds; None: no limit.
        budget: what never rises above the start: the number of ranks, or that and their parameters.
        growth_rows: training rows along whose gradient new ranks point; none: anywhere.
        batch_size: rows of a micro-batch while scoring; None: the trainer's.
        seed: None: the trainer's.
        schedule: the rounds themselves, in the place of `rounds`, `warmup` and `interval`.
        scorer: (model, batch, prune) → RankScores in the place of AB-LoRA's.
        attempt: how work on a batch is tried, where memory may run out.

    Raises:
        InputError: no rows, rows without `input_ids` and `labels`, or a value out of range.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        *,
        rounds: int = 8,
        warmup: int | float | str = 0.3,
        interval: int | float | str = 0.05,
        prune_per_round: int | None = None,
        scoring: Scoring = "auto",
        importance: Importance | None = None,
        min_rank: int = 0,
        max_rank: int | None = None,
        budget: Budget = "parameters",
        growth_rows: Iterable[Mapping[str, Any]] = (),
        batch_size: int | None = None,
        seed: int | None = None,
        schedule: Schedule | None = None,
        scorer: Scorer | None = None,
        attempt: Attempt[tuple[Record, RankScores]] = once,
    ):
        check_choice("scoring", scoring, get_args(Scoring))
        check_choice("budget", budget, get_args(Budget))
        check_choice("importance", importance, (None, *get_args(Importance)))
        if importance and (importance == "path") != (scoring == "path"):
            raise InputError(f"importance={importance!r}: scoring={scoring!r} does not give it; path goes with path.")
        for name, duration in {"warmup": warmup, "interval": interval}.items():
            try:
                parse_duration(duration)
            except (TypeError, ValueError):
                raise InputError(
                    f'{name}={duration!r}: takes optimizer steps (20), a share of the run (0.3) or epochs ("1 epoch").'
                ) from None
        whole("rounds", rounds, 0)
        whole("min_rank", min_rank, 0)
        for name, value in {"prune_per_round": prune_per_round, "max_rank": max_rank, "batch_size": batch_size}.items():
            whole(name, value, optional=True)
        self.rows = tokenized(rows, "rows")
        self.growth_rows = tokenized(growth_rows, "growth_rows") if growth_rows else []
        self.durations = {"rounds": rounds, "warmup": warmup, "interval": interval}
        self.given_schedule = schedule
        self.asked: dict[str, Any] = {
            "prune": prune_per_round,
            "scoring": scoring,
            "importance": importance or ("path" if scoring == "path" else "sum"),
            "min_rank": min_rank,
            "max_rank": max_rank,
        }
        self.budget, self.batch_size, self.seed = budget, batch_size, seed
        self.scorer, self.attempt = scorer, attempt
        self.rounds = schedule or Schedule((), False)
        self.history: list[Record] = []
        self._before: list[tuple[Record, Mapping[str, object]]] = []

    def record_start(self, record: Record, scores: Mapping[str, object]) -> None:
        """Takes what shared out the budget before the first step into the history."""
        self._before = [(record, scores)]

    def done(self) -> int:
        """Rounds of Algorithm 1 so far; the sharing out before the first step is none."""
        return sum(record["step"] > 0 for record in self.history)

    def on_train_begin(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: PeftModel,
        processing_class: object = None,
        train_dataloader: DataLoader[object] | None = None,
        **kwargs: object,
    ) -> None:
        """
        Raises:
            InputError: no adapter on the model or one that cannot move, a second callback, or a run that is too short
                for a round.
        """
        check_adapted(model, "AllocationCallback")
        check_own(model, "AllocationCallback")
        if not any(layer.A.requires_grad for layer in gated_layers(model).values()):
            raise InputError("AllocationCallback: the adapter is frozen; load it with load_adapter(…, trainable=True).")
        if vars(state).setdefault("allocation", self) is not self:  # a state is of one training
            raise InputError(f"AllocationCallback: the trainer has two; give it one, for they share {HISTORY}.")
        to_fp32(model)
        self.file = Path(str(args.output_dir)) / HISTORY
        # A checkpoint's ranks are those of the rounds up to it; what a later, lost part of the run did never happened.
        if state.global_step:
            self.history = [record for record in read_history(self.file) if record["step"] <= state.global_step]
        else:
            self.history = []
            for record, scores in self._before:
                self._keep(record, scores)
        collate = Collator(getattr(processing_class, "pad_token_id", None) or 0)
        size = self.batch_size or args.per_device_train_batch_size
        self.batch = micro_batches(self.rows, size, collate)
        self.growth = micro_batches(self.growth_rows, size, collate) if self.growth_rows else []
        start = ranks_at_start(self.history, ranks(model), list(linear_maps(model)))
        self.rounds = self.given_schedule or self._schedule(args, state)
        parameters = sum(start[name] * cost for name, cost in rank_parameters(model, start).items())
        self.settings = RoundSettings(
            **{**self.asked, "prune": self.asked["prune"] or len(start)},
            budget=sum(start.values()),
            parameters=parameters if self.budget == "parameters" else None,
            seed=args.seed if self.seed is None else self.seed,
            modules=tuple(start),
            step_tokens=self._row_tokens(train_dataloader)
            * args.per_device_train_batch_size
            * args.gradient_accumulation_steps,
        )
        self._write()

    def on_step_end(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: PeftModel,
        optimizer: Optimizer | None = None,
        **kwargs: object,
    ) -> None:
        if state.global_step not in self.rounds.steps:
            return
        growth = on_device(self.growth, args.device)
        spent = sum(earlier["forward_equivalents"] for earlier in self.history)

        def round_of(batch: Sequence[MicroBatch]) -> tuple[Record, RankScores]:
            # Nothing changes before the scores are there, so a round that ran out of memory can begin anew.
            return allocation_round(
                model,
                optimizer,
                batch,
                self.settings,
                state.global_step,
                spent=spent,
                growth=growth,
                scorer=self.scorer,
            )

        record, scores = self.attempt(on_device(self.batch, args.device), round_of)
        names = ("method", "loss", "base_loss", "drop", "alone", "importance", "stderr", "exact")
        self._keep(record, {name: getattr(scores, name) for name in names})
        self._write()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """
        Raises:
            AnswerNo: the run was to allocate, and never did.
        """
        if self.given_schedule is None and self.rounds.steps and not self.done():  # else who gave it looks after it
            raise AnswerNo(
                f"the run ended after step {state.global_step}, before its first round of allocation (step "
                f"{self.rounds.steps[0]}); lower warmup, or train longer."
            )

    def _schedule(self, args: TrainingArguments, state: TrainerState) -> Schedule:
        per_epoch = state.max_steps / (state.num_train_epochs or 1)
        planned = schedule(total_steps=state.max_steps, steps_per_epoch=per_epoch, **self.durations)  # type: ignore[arg-type]
        if self.durations["rounds"] and not planned.steps:
            raise InputError(
                f"AllocationCallback: a run of {state.max_steps} optimizer steps has no room for a round; train "
                "longer, or pass rounds=0."
            )
        return planned

    def _row_tokens(self, train_dataloader: DataLoader[object] | None) -> float:
        """Tokens of a training row on average; of a scoring row, where the training rows do not say."""
        dataset: Any = getattr(train_dataloader, "dataset", ())
        try:
            named = getattr(dataset, "column_names", None)  # a column of datasets' is read at once, its rows one by one
            lengths = [len(ids) for ids in (dataset["input_ids"] if named else [row["input_ids"] for row in dataset])]
        except (KeyError, TypeError):
            lengths = []
        lengths = lengths or [len(row["input_ids"]) for row in self.rows]
        return sum(lengths) / len(lengths)

    def _keep(self, record: Record, scores: Mapping[str, object]) -> None:
        scores_file = self.file.parent / "scores" / f"step-{record['step']}.json"
        write_whole(scores_file, json.dumps(scores))
        self.history.append({"step": record["step"], "scores": f"scores/{scores_file.name}", **record})

    def _write(self) -> None:
        write_whole(self.file, "".join(json.dumps(record) + "\n" for record in self.history))


def tokenized(rows: Iterable[Mapping[str, Any]], name: str) -> list[Row]:
    """Rows as they are batched: input_ids and labels of each.

    Args:
        rows: with `labels`, or with the mask of what is learned that TRL writes (completion_mask, assistant_masks).
        name: the parameter that a message names.

    Raises:
        InputError: none, or one that is not tokenized.
    """
    found = []
    for i, row in enumerate(rows):
        masks = [row[mask] for mask in ("completion_mask", "assistant_masks") if row.get(mask) is not None]
        if "input_ids" not in row or ("labels" not in row and not masks):
            raise InputError(
                f"{name}: row {i} has no {'labels' if 'input_ids' in row else 'input_ids'}; qalora.load_rows makes "
                "rows with both, from files and from rows of text."
            )
        ids = list(row["input_ids"])
        labels = (
            list(row["labels"])
            if "labels" in row
            else [t if all(m) else IGNORE for t, *m in zip(ids, *masks, strict=True)]
        )
        found.append(Row(input_ids=ids, labels=labels, row=row.get("row", i)))
    if not found:
        raise InputError(f"{name}: it holds no row; qalora.load_rows makes some, from files and from rows of text.")
    return found


def ranks_at_start(history: Sequence[Record], now: Mapping[str, int], order: Sequence[str]) -> dict[str, int]:
    """Module → its ranks before the first record of a history, in `order`; `now`, where there is no record yet."""
    if not history:
        return dict(now)
    first = history[0]
    before = {name: rank - first["grown"].get(name, 0) for name, rank in first["ranks"].items()}
    for name, pruned in first["pruned"].items():
        before[name] = before.get(name, 0) + len(pruned)
    return {name: before[name] for name in order if before.get(name)}


def read_history(file: Path) -> list[Record]:
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
