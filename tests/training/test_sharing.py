"""What each of several processes computes of a step: every row once, in shares of like size."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qalora import processes
from qalora.data.batching import Collator, PackingCollator, pack
from qalora.training.sharing import cut, own_parts, randomness_of, sum_gradients, units_of


@given(rows=st.lists(st.integers(1, 7), min_size=1, max_size=9), size=st.integers(1, 6))
def test_every_row_is_one_process_and_shares_differ_by_a_row(rows, size):
    units = [[1] * count for count in rows]
    parts = [own_parts(units, rank, size) for rank in range(size)]
    for place, count in enumerate(rows):
        covered = [row for own in parts if own[place] for row in range(*own[place])]
        assert covered == list(range(count))  # in the order of the processes, and none twice
    shares = [sum(end - start for start, end in filter(None, own)) for own in parts]
    assert max(shares) - min(shares) <= 1


@given(
    units=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=6), min_size=1, max_size=5), size=st.integers(1, 4)
)
def test_packed_samples_stay_whole_and_shares_are_as_even_as_the_samples_allow(units, size):
    parts = [own_parts(units, rank, size) for rank in range(size)]
    total, longest = sum(map(sum, units)), max(map(max, units))
    for place, samples in enumerate(units):
        borders = {sum(samples[:count]) for count in range(len(samples) + 1)}
        covered = [own[place] for own in parts if own[place]]
        assert [start for start, _ in covered] == [0, *(end for _, end in covered[:-1])]
        assert covered[-1][1] == sum(samples) and {end for part in covered for end in part} <= borders
    for own in parts:
        assert sum(end - start for start, end in filter(None, own)) <= total / size + longest


def test_parts_of_padded_and_packed_batches_are_their_rows_and_samples():
    rows = [{"input_ids": [n] * n, "labels": [n] * n, "row": n} for n in (3, 1, 4, 2)]
    padded = Collator(0)(rows)
    del padded["rows"]
    assert units_of(padded) == [1, 1, 1, 1]
    assert cut(padded, (1, 3))["input_ids"].tolist() == [[1, 0, 0, 0], [4, 4, 4, 4]]
    packed = PackingCollator()(pack(rows, 6))
    del packed["rows"]
    assert units_of(packed) == [4, 2, 3, 1]
    assert {name: value.tolist() for name, value in cut(packed, (6, 10)).items()} == {
        "input_ids": [[3, 3, 3, 1]], "labels": [[-100, 3, 3, -100]], "position_ids": [[0, 1, 2, 0]],
    }  # fmt: skip


def test_gradients_travel_as_one_tensor_and_come_back_in_their_shapes(monkeypatch):
    """A process without rows has no gradients, and gets those of the others."""
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    parameters[0].grad = torch.arange(6.0).view(2, 3)
    travelled = []

    def of_two_alike(bucket: torch.Tensor) -> None:
        travelled.append(len(bucket))
        bucket *= 2

    monkeypatch.setattr(processes, "sum_", of_two_alike)
    rest = sum_gradients(parameters, [torch.tensor([1.5]), torch.tensor([True, False])])
    assert travelled == [13]
    assert rest.tolist() == [3.0, 2.0, 0.0]
    assert torch.equal(parameters[0].grad, 2 * torch.arange(6.0).view(2, 3))
    assert torch.equal(parameters[1].grad, torch.zeros(4))


def test_randomness_of_a_part_is_its_own_and_touches_no_other():
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    drawn = []
    for rank in (0, 1, 0):
        with randomness_of(42, 7, 0, rank):
            drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.rand(3), wanted)


TWO_RUNS = """
import qalora
for output_dir, settings in {runs!r}:
    qalora.finetune({file!r}, {{"output_dir": output_dir, **settings}})
sys.exit(0)
"""


def test_a_script_makes_two_runs_of_packed_rows_and_with_dropout(recipe_over, launch, tmp_path):
    """In one launch, and with more processes than the second one's steps have rows."""
    recipe = recipe_over(**{"training.max_steps": 3, "evaluation.before": False, "logging.steps": 1})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    few = {"training.micro_batch_size": 1, "training.gradient_accumulation_steps": 1, "lora.dropout": 0.1}
    runs = [(str(tmp_path / "packed"), {"data.packing": True}), (str(tmp_path / "dropout"), few)]
    run = launch(2, code=TWO_RUNS.format(runs=runs, file=str(file)))
    assert run.codes == [0, 0], run.said
    assert run.said[0].count("step 3/3  loss") == 2
    assert run.said[0].count("= 1: the rows of a step leave 1 of 2 processes without any") == 1
