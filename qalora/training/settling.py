"""What a model, an adapter, a machine or an earlier run decides of a recipe. Each gives a new recipe; none is edited.
Torch-free at import.

    settled             the model: its positions, and the form in which it is stored
    with_its_own        lora.adapter: r, alpha, target_modules
    as_it_began         the run that is continued: what its beginning chose by itself
    fitted_to_device    the memory of this machine, where training.fit or gradient_checkpointing=auto asks for it
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora import processes
from qalora.adapter.given import given_adapter
from qalora.base.registry import (
    ModelSource,
    check_packing,
    published_fields,
    quantization_in,
    said_of_family,
    shape_of,
)
from qalora.errors import InputError
from qalora.fitting import HEADROOM
from qalora.recipe.rules import FOLLOWERS
from qalora.training.planning import at_fastest_level, decided_by_fit, first_ranks, fitted, planner
from qalora.training.resume import Continued, check_settings

if TYPE_CHECKING:
    from qalora.base.registry import ModelShape
    from qalora.recipe import Recipe

Noted = tuple["Recipe", list[str]]  # a recipe, and a line per setting that gave way


def settled(recipe: Recipe, source: ModelSource) -> Noted:
    """The recipe as its model can take it.

    Raises:
        InputError: a setting that its family cannot have.
    """
    recipe, notes = within_positions(recipe, source)
    recipe, more = as_stored(recipe, source)
    shape = shape_of(source)
    if recipe.data.packing:
        check_packing(shape.model_type)
    return recipe, [*notes, *more, *said_of_family(shape)]


def check_targets(recipe: Recipe, source: ModelSource) -> None:
    """
    Raises:
        InputError: lora.target_modules or lora.layers_to_transform name what the model has not.
    """
    lora = recipe.lora  # an adapter that is given has its own
    if not lora.adapter and (lora.target_modules != "all-linear" or lora.layers_to_transform is not None):
        first_ranks(recipe, shape_of(source))


def within_positions(recipe: Recipe, source: ModelSource) -> Noted:
    """With data.max_seq_len at most the positions that the model has."""
    positions, asked = shape_of(source).positions, recipe.data.max_seq_len
    if positions is None or asked <= positions:
        return recipe, []
    note = f"data.max_seq_len={asked}: {recipe.model} has {positions} positions; longer rows are cut there"
    return recipe.with_settings({"data.max_seq_len": positions}), [note]


def as_stored(recipe: Recipe, source: ModelSource) -> Noted:
    """With the 4-bit form of a base that is stored so, for nothing else can be made of it; noted where the recipe says
    another."""
    settings = recipe.quantization
    stored = {} if source.shape is not None else quantization_in(published_fields(source), source.name)
    kept: dict[str, Any] = {}
    for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        if stored.get(name) not in (None, getattr(settings, name)):
            kept[name] = stored[name]
    contradicted = [
        f"quantization.{name}={str(getattr(settings, name)).lower()} (stored: {str(value).lower()})"
        for name, value in kept.items()
        if name in settings.model_fields_set
    ]
    taken = f"{recipe.model} is stored in 4 bits and is taken as it is, whatever the recipe says"
    notes = [f"{taken}: {', '.join(contradicted)}"] if contradicted else []
    return recipe.with_settings({f"quantization.{name}": value for name, value in kept.items()}), notes


def with_its_own(recipe: Recipe) -> Recipe:
    """With `lora.adapter`, r, alpha and target_modules become that adapter's.

    Raises:
        InputError: no adapter there, or a setting beside it that contradicts it.
    """
    if not recipe.lora.adapter:
        return recipe
    given = given_adapter(recipe.lora.adapter)
    given.check_settings({name: getattr(recipe.lora, name) for name in recipe.lora.model_fields_set})
    alpha = int(given.alpha) if float(given.alpha).is_integer() else recipe.lora.alpha
    return recipe.with_settings({"lora.r": given.r, "lora.target_modules": given.target_modules, "lora.alpha": alpha})


def as_it_began(recipe: Recipe, continued: Continued) -> Recipe:
    """With what the beginning of the run chose by itself: the dtype, the start, the settings that were fitted, and
    those that came from `lora.adapter`.

    Raises:
        InputError: a setting that would make it another run.
    """
    begun, lora = continued.settings, recipe.lora
    now, then = recipe.training.lr_scheduler_type, begun["training"]["lr_scheduler_type"]
    if (now in FOLLOWERS) != (then in FOLLOWERS):
        raise InputError(
            f"--resume-from-checkpoint: training.lr_scheduler_type is {now}, and {continued.checkpoint} was made with "
            f"{then}: one follows the steps and the other the validation loss; keep it, or start anew."
        )
    kept: dict[str, Any] = {}
    adapter, first = lora.adapter, begun["lora"].get("adapter")
    if adapter is None or (first and _same_path(adapter, first)):
        kept["lora.adapter"] = adapter = first
    if adapter is not None and adapter == first:
        own = {"r", "alpha", "target_modules"} - lora.model_fields_set
        kept |= {f"lora.{name}": begun["lora"][name] for name in own}
    if recipe.training.fit:
        kept |= {f"training.{name}": begun["training"][name] for name in decided_by_fit(recipe)}
    elif recipe.training.gradient_checkpointing == "auto":
        names = ("gradient_checkpointing", "mlp_tile")
        kept |= {f"training.{name}": begun["training"][name] for name in names}
    check_settings(recipe.with_settings(kept).model_dump(mode="json"), begun, continued.checkpoint)
    if recipe.quantization.bnb_4bit_compute_dtype == "auto":
        kept["quantization.bnb_4bit_compute_dtype"] = begun["quantization"]["bnb_4bit_compute_dtype"]
    kept |= {"lora.init": begun["lora"]["init"], "allocation.start": begun["allocation"]["start"]}
    return recipe.with_settings(kept)


def fitted_to_device(recipe: Recipe, shape: ModelShape, longest: int) -> Noted:
    """With the micro-batch, accumulation, checkpointing and tiling that the memory of this machine has room for, those
    of them that the recipe leaves open.

    Args:
        longest: tokens of the longest row.

    Raises:
        InputError: nothing fits; or block inputs are to wait in host memory, and that has no room for them.
    """
    from qalora.base.device import available_memory, device_kind, host_memory

    recipe, device = with_dtype(recipe), device_kind()
    count, here = processes.size(), processes.on_this_machine()  # the processes of a machine share its memory
    on_card = device == "cuda"
    memory = processes.least(available_memory() // (1 if on_card else here))
    host = processes.least(host_memory() // here) if on_card else None
    if not recipe.training.fit:
        asked = recipe
        recipe = at_fastest_level(recipe, shape, memory, seq_len=longest, device=device, host=host, processes=count)
        check_host_memory(recipe, shape, longest, device, host, count)
        chosen = f"training.gradient_checkpointing={str(recipe.training.gradient_checkpointing).lower()}"
        note = f"for {memory / 2**30:.1f} GiB and rows of up to {longest} tokens: {chosen}"
        return recipe, [] if recipe == asked else [note]
    recipe, fits = fitted(recipe, shape, memory, seq_len=longest, device=device, processes=count)
    if not fits:
        needed = planner(recipe, shape, device, processes=count)(seq_len=longest).total
        raise InputError(
            f"training.fit=auto: one row of {longest} tokens of {recipe.model} needs {needed / 2**30:.2f} GiB, of "
            f"{memory / 2**30:.2f} GiB; lower data.max_seq_len or lora.r, or take a smaller model."
        )
    check_host_memory(recipe, shape, longest, device, host, count)
    chosen = ", ".join(f"training.{key}={value}" for key, value in decided_by_fit(recipe).items())
    return recipe, [f"for {memory / 2**30:.1f} GiB and rows of up to {longest} tokens: {chosen}"]


def check_host_memory(
    recipe: Recipe, shape: ModelShape, longest: int, device: str, host: int | None, count: int = 1
) -> None:
    """
    Args:
        longest: tokens of the longest row.
        host: bytes of host memory that each process may use; None: the device has no memory of its own.
        count: processes that share the rows of a step.

    Raises:
        InputError: block inputs are to wait in host memory, and that has no room for them.
    """
    needed = planner(recipe, shape, device, processes=count)(seq_len=longest).host
    if host is not None and needed > HEADROOM * host:
        raise InputError(
            "training.gradient_checkpointing=offload: the block inputs of "
            f"{recipe.training.micro_batch_size} × {longest} tokens need {needed / 2**30:.1f} GiB "
            f"of host memory, of {host / 2**30:.1f} GiB; lower "
            "training.micro_batch_size or data.max_seq_len, or set training.gradient_checkpointing=true."
        )


def with_dtype(recipe: Recipe) -> Recipe:
    """With the compute dtype that `auto` means on this machine.

    Raises:
        InputError: a dtype that the device is slow or wrong with.
    """
    from qalora.base.device import best_device
    from qalora.base.loading import choose_compute_dtype

    asked = recipe.quantization.bnb_4bit_compute_dtype
    # What is faster here is measured, and need not come out alike in every process.
    dtype = processes.from_first(lambda: choose_compute_dtype(asked, str(best_device())))
    return recipe.with_settings({"quantization.bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")})


def _same_path(one: str, other: str) -> bool:
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()
