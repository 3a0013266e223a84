"""What a cut costs, and the cut itself: orders of ranks, losses with some ranks alone, and the ranks that leave."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor

from qalora import processes
from qalora.adapter.ablation import MicroBatch, scoring_mode
from qalora.adapter.compression import Kept, Order, Point, paired, parameters_of, shrunk
from qalora.adapter.layer import Factors, gated, having
from qalora.adapter.model import gated_layers, rank_parameters, remove_layer, sync_config
from qalora.adapter.scores import PerRank
from qalora.adapter.scoring import path_shares, score_ranks
from qalora.adapter.surgery import replace_ranks
from qalora.data.rows import targets
from qalora.kernels.loss import row_losses
from qalora.progress import track


@dataclass(frozen=True)
class Losses:
    """Of every row of a batch, in its order: summed over the supervised tokens, in nats, and how many those are."""

    rows: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        return sum(self.rows) / sum(self.tokens)


def rank_orders(
    model: PeftModel, values: PerRank, batch: Sequence[MicroBatch], which: Collection[Order]
) -> dict[Order, PerRank]:
    """Scores of every rank by which ranks can be ordered, in the basis that the model is in.

    Args:
        values: of `into_basis`.
        batch: the rows that score; `values` alone needs none.
        which: values: squared singular values, the energy that a rank carries; path; sum: the paper's; shrunk: path
            towards the singular values by its standard errors.

    Raises:
        AnswerNo: a score is not finite.
    """
    found: dict[Order, PerRank] = {}
    if {"path", "shrunk"} & set(which):
        path = path_shares(model, batch)
        found["path"] = path.importance
        if path.stderr is not None:
            found["shrunk"] = shrunk(path.importance, path.stderr, values)
    if "sum" in which:
        found["sum"] = score_ranks(model, batch, "first-order").importance
    found["values"] = {name: [value * value for value in of] for name, of in values.items()}
    return {order: found[order] for order in which if order in found}


def losses(
    model: PeftModel, batch: Sequence[MicroBatch], ranks: Kept | None = None, factors: Factors | None = None
) -> Losses:
    """The losses of every row with these ranks alone, which several processes share.

    Args:
        ranks: those whose gates stay open; none of them: the base alone; None: the whole adapter.
        factors: of the layers; None: their own.
    """
    layers = gated_layers(model)
    gates = {} if ranks is None else gates_of(model, ranks, factors)

    def of(micro: MicroBatch) -> tuple[list[float], list[int]]:
        return row_losses(model, micro).double().tolist(), targets(micro["labels"]).sum(1).tolist()

    with scoring_mode(model), torch.no_grad(), having(layers, factors or {}), gated(layers, gates):
        found = processes.together(batch, of, partial(track, what="measuring"))
    return Losses([loss for rows, _ in found for loss in rows], [count for _, tokens in found for count in tokens])


def gates_of(model: PeftModel, ranks: Kept, factors: Factors | None = None) -> dict[str, Tensor]:
    """Module → (r,) gates at which these ranks alone are open; factors: of the layers; None: their own."""
    gates = {}
    for name, layer in gated_layers(model).items():
        A, _ = (factors or {}).get(name, (layer.A, layer.B))
        gates[name] = torch.zeros(len(A), device=A.device)
        gates[name][ranks.get(name, [])] = 1.0
    return gates


def point(
    model: PeftModel,
    batch: Sequence[MicroBatch],
    ranks: Kept,
    factors: Factors | None = None,
    *,
    whole: Losses,
    of: int,
) -> Point:
    """The cost of a cut on rows that gave no scores; the model stays as it is.

    Args:
        ranks: that stay.
        factors: of the layers; None: their own.
        whole: losses of the whole adapter on the same batch.
        of: ranks of the whole adapter, of which shares are.
    """
    found = losses(model, batch, ranks, factors)
    difference, stderr = paired(found.rows, whole.rows, whole.tokens)
    total = sum(map(len, ranks.values()))
    parameters = parameters_of(ranks, rank_parameters(model, ranks))
    return Point(total / of, total, parameters, found.mean, difference, stderr, ranks, factors)


def cut(model: PeftModel, ranks: Kept, factors: Factors | None = None) -> None:
    """Takes all other ranks off the adapter; a module that keeps none leaves it. Scalings stay, and PEFT's config says
    what is left.

    Args:
        factors: of the layers from then on; None: their own.
    """
    for name, layer in gated_layers(model).items():
        index = torch.tensor(ranks.get(name, []), dtype=torch.long, device=layer.A.device)
        if len(index):
            A, B = (factors or {}).get(name, (layer.A.data, layer.B.data))
            replace_ranks(layer, A[index], B[:, index])
        else:
            remove_layer(model, name)
    sync_config(model)
