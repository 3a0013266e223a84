"""What must agree among the sections of a recipe. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from qalora.recipe.settings import AllocationConfig, Recipe, TrainingConfig

FOLLOWERS = ("reduce_lr_on_plateau", "greedy")  # schedules that follow the validation loss


def disagreements(recipe: Recipe) -> Iterator[str]:
    """What of a recipe's settings contradicts what else, a sentence each."""
    yield from _missing(recipe)
    yield from _of_the_rate(recipe.training)
    yield from _of_the_start(recipe)
    yield from _of_the_scores(recipe.allocation)
    if not recipe.lora.adapter:  # which brings r and alpha of its own
        yield from _of_the_ranks(recipe)


def _missing(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if not recipe.model:
        yield "model is missing: pass --model NAME, FOLDER or FILE.gguf"
    if not data.train:
        yield "data.train is missing: pass data.train=FILE or a Hub id"
    if data.validation is None and not data.val_set_size:
        yield "no validation rows: set data.validation, or data.val_set_size above 0"
    if data.val_set_size >= 1 and data.val_set_size != int(data.val_set_size):
        yield f"data.val_set_size={data.val_set_size}: a number of rows is whole, a share is below 1"


def _of_the_rate(training: TrainingConfig) -> Iterator[str]:
    if training.warmup_steps is not None and training.warmup_ratio is not None:
        yield (
            f"training.warmup_steps={training.warmup_steps} and training.warmup_ratio={training.warmup_ratio} say "
            "the same thing twice: leave one out"
        )
    if training.lr_scheduler_type in FOLLOWERS and training.eval_strategy == "no":
        yield (
            f"training.lr_scheduler_type={training.lr_scheduler_type} follows the validation loss, and "
            "training.eval_strategy=no takes none: set it to steps or epoch"
        )


def _of_the_start(recipe: Recipe) -> Iterator[str]:
    lora, by_scores = recipe.lora, recipe.allocation.start == "scores"
    asked = "allocation.start=scores" if by_scores else f"lora.init={lora.init}"
    if lora.adapter and (lora.init not in ("auto", "kaiming") or by_scores):
        yield f"{asked} places new ranks, and lora.adapter={lora.adapter} brings trained ones: leave one of them out"
    if lora.adapter and lora.layers_to_transform is not None:
        yield (
            f"lora.layers_to_transform={','.join(map(str, lora.layers_to_transform))} chooses blocks for new ranks, "
            f"and lora.adapter={lora.adapter} brings its own: leave one of them out"
        )
    if by_scores and lora.init not in ("auto", "quantization"):
        yield (
            "allocation.start=scores chooses among the ranks of lora.init=quantization, and lora.init is "
            f"{lora.init}: set lora.init=quantization too"
        )
    elif (by_scores or lora.init == "quantization") and not recipe.quantization.load_in_4bit:
        asked = "lora.init=quantization" if lora.init == "quantization" else "allocation.start=scores"
        yield (
            f"{asked} gives back what 4 bits took, and quantization.load_in_4bit is false: nothing was taken; leave it "
            "out, or set lora.init=gradient"
        )


def _of_the_scores(allocation: AllocationConfig) -> Iterator[str]:
    scoring, kind = allocation.scoring, allocation.kind
    if (scoring == "path") != (kind == "path") and scoring != "auto":
        yield (
            f"allocation.importance={kind} is not what allocation.scoring={scoring} measures: path goes with "
            "scoring path or auto, the others with any but path"
        )


def _of_the_ranks(recipe: Recipe) -> Iterator[str]:
    lora, allocation = recipe.lora, recipe.allocation
    low, high = allocation.min_rank, allocation.max_rank
    if high is not None and not low <= lora.r <= high:
        yield f"lora.r={lora.r} must lie between allocation.min_rank={low} and max_rank={high}"
    elif low > lora.r:
        yield f"allocation.min_rank={low} is above lora.r={lora.r}: lower it, or raise lora.r"
    scaling = lora.alpha / lora.r
    moving = allocation.rounds != 0 or allocation.start == "scores"
    if moving and any((scaling * r) / r != scaling for r in range(1, 1025)):
        yield (
            f"lora.alpha={lora.alpha} over lora.r={lora.r} is a scaling that PEFT cannot keep when ranks change: "
            f"make alpha a multiple of r, e.g. lora.alpha={2 * lora.r}"
        )
