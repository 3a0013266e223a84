"""The figures of a run's page hold what its files say."""

from __future__ import annotations

from qalora.results.facts import RunFacts, read_run
from qalora.results.figures import DARK, RANKS, drawn_terms, losses, memory, rank_map, speed


def test_losses_are_those_of_the_log_with_a_line_at_each_round(run):
    figure = losses(read_run(run))
    training, validation = figure.data
    assert list(training.x) == list(range(1, 13)) and training.y[0] == 2.9
    assert (list(validation.x), list(validation.y)) == ([12], [1.3])
    assert [line.x0 for line in figure.layout.shapes] == [4, 8]


def test_memory_is_the_plan_by_term_and_the_peak_in_mib(run):
    bars = {bar.name: bar.x[0] for bar in memory(read_run(run)).data}
    assert bars == {"4-bit weights": 3.0, "adapter": 1.0, "peak": 1024.0}


def test_what_is_gone_again_is_taken_off_what_the_blocks_kept():
    terms = {"adapter": 5, "checkpoints": 7, "gone before gradients are whole": -3, "block working set": 0}
    assert drawn_terms({"terms": terms}) == {"adapter": 5, "checkpoints": 4}


def test_the_map_has_a_state_for_the_start_and_every_round(run):
    figure, states = rank_map(read_run(run))
    assert [state["label"] for state in states] == ["start", "step 4", "step 8"]
    assert [state["total"] for state in states] == [12, 12, 12]
    heat = figure.data[0]
    assert heat.zmin < 2 < heat.zmax and len(heat.z) == 3 and len(heat.z[0]) == 2


def test_nothing_known_is_no_figure():
    empty = RunFacts("x")
    assert losses(empty) is speed(empty) is memory(empty) is rank_map(empty) is None


def test_every_colour_of_the_map_has_one_on_a_dark_page():
    assert set(RANKS) <= set(DARK)
