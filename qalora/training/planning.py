"""The memory plan of a recipe, and the recipe with which a step fits a memory: pure, torch-free."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from math import ceil
from typing import Any

from qalora.adapter.given import given_adapter
from qalora.adapter.targets import targeted
from qalora.base.registry import ModelShape
from qalora.fitting import Plan, fastest, fit, largest, least
from qalora.memory import plan_memory
from qalora.recipe import Recipe
from qalora.sizes import MLP_TILE


def planner(
    recipe: Recipe,
    shape: ModelShape,
    device: str = "cuda",
    *,
    ranks: Mapping[str, int] | None = None,
    processes: int = 1,
) -> Plan:
    """`plan_memory` with the recipe's settings, of which any can be set anew: its targets, and its longest rows.

    Args:
        shape: of the recipe's model.
        device: cuda or cpu.
        ranks: full module name → rank; None: as the recipe begins.
        processes: that share the rows of a step.
    """
    dtype, kept = recipe.quantization.bnb_4bit_compute_dtype, recipe.training.gradient_checkpointing
    return partial(
        plan_memory,
        shape,
        ranks=first_ranks(recipe, shape) if ranks is None else ranks,
        micro_batch_size=recipe.training.micro_batch_size,
        gradient_accumulation_steps=recipe.training.gradient_accumulation_steps,
        seq_len=recipe.data.max_seq_len,
        load_in_4bit=recipe.quantization.load_in_4bit,
        double_quant=recipe.quantization.bnb_4bit_use_double_quant,
        compute_dtype="bfloat16" if dtype == "auto" else dtype,
        optim=recipe.training.optim,
        # Where no memory is known yet that `auto` could look at, it is planned as what most runs fit with.
        gradient_checkpointing=True if kept == "auto" else kept,
        mlp_tile=recipe.training.mlp_tile,
        dropout=recipe.lora.dropout,
        directions=recipe.lora.r if recipe.chosen_init(sixteen_bit=True) == "gradient" else 0,
        packed=recipe.data.packing,
        device=device,
        processes=processes,
    )


def first_ranks(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """Full module name → ranks that its adapter begins with.

    Raises:
        InputError: the recipe targets what the model has not.
    """
    lora = recipe.lora
    if lora.adapter:
        return given_adapter(lora.adapter).ranks
    return dict.fromkeys(targeted(shape.linear_maps(), lora.target_modules, lora.layers_to_transform), lora.r)


def fitted(
    recipe: Recipe,
    shape: ModelShape,
    memory: int,
    *,
    seq_len: int | None = None,
    device: str = "cuda",
    processes: int = 1,
) -> tuple[Recipe, bool]:
    """(the recipe with the micro-batch, accumulation, checkpointing and tiling that fit the memory, True); where
    nothing fits, with those that need least, and False.

    Args:
        memory: bytes.
        seq_len: tokens of the longest row (default: data.max_seq_len).
        processes: that share the rows of a step; a micro-batch has at most the rows of one of them.
    """
    training, seq_len = recipe.training, seq_len or recipe.data.max_seq_len
    batch_size = training.micro_batch_size * training.gradient_accumulation_steps
    planned = planner(recipe, shape, device, processes=processes)
    found = fit(planned, memory, batch_size=batch_size, seq_len=seq_len, most=ceil(batch_size / processes))
    settings = (found or least(batch_size)).settings()
    return recipe.with_settings({f"training.{name}": value for name, value in settings.items()}), found is not None


def at_fastest_level(
    recipe: Recipe,
    shape: ModelShape,
    memory: int,
    *,
    seq_len: int | None = None,
    device: str = "cuda",
    host: int | None = None,
    processes: int = 1,
) -> Recipe:
    """The recipe with what `training.gradient_checkpointing=auto` comes to.

    Args:
        memory: bytes.
        seq_len: tokens of the longest row (default: data.max_seq_len).
        host: bytes of host memory, on a device that has its own memory beside it.
        processes: that share the rows of a step.
    """
    training = recipe.training
    if training.gradient_checkpointing != "auto":
        return recipe
    plan = partial(planner(recipe, shape, device, processes=processes), seq_len=seq_len or recipe.data.max_seq_len)
    level = fastest(plan, memory, host=host, tile=training.mlp_tile)
    return recipe.with_settings(
        {"training.gradient_checkpointing": level.checkpointing, "training.mlp_tile": level.mlp_tile}
    )


def on_card(recipe: Recipe, shape: ModelShape, card: int, *, seq_len: int | None = None, processes: int = 1) -> Recipe:
    """`at_fastest_level` of a card in a machine of which nothing is known: its host memory is taken to suffice."""
    return at_fastest_level(recipe, shape, card, seq_len=seq_len, host=sys.maxsize, processes=processes)


def decided_by_fit(recipe: Recipe) -> dict[str, Any]:
    """The settings of `training` that a fit decides."""
    names = "micro_batch_size gradient_accumulation_steps gradient_checkpointing mlp_tile"
    return {name: getattr(recipe.training, name) for name in names.split()}


def limits(planned: Plan, memory: int) -> dict[str, int]:
    """The largest micro-batch with the settings as they are, and the longest context with the most frugal ones."""
    frugal = partial(planned, micro_batch_size=1, gradient_checkpointing="offload", mlp_tile=MLP_TILE)
    return {
        "largest_micro_batch_size": largest(planned, memory, "micro_batch_size"),
        "longest_context": largest(frugal, memory, "seq_len"),
    }
