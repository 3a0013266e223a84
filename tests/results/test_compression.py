from __future__ import annotations

import pytest

from qalora.results.compression import in_sentences, section


@pytest.fixture
def report():
    return {
        "whole": {"ranks": 1680, "parameters": 2_442_240, "loss": 1.3215},
        "kept": {
            "share": 0.25, "ranks": 420, "parameters": 600_000, "loss": 1.3205, "difference": -0.001, "stderr": 0.0021,
        },
        "base_loss": 2.79,
        "judged_on": {"rows": 168, "supervised_tokens": 5000},
        "order": "shrunk",
        "orders": ["path", "values", "shrunk"],
        "whole_hurts": False,
        "lowest": {"ranks": 840, "loss": 1.31},
        "gain": 1.47,
        "gain_stderr": 0.05,
    }  # fmt: skip


def test_what_was_kept_is_said(report):
    size, loss, order = in_sentences(report)
    assert size == "420 of 1,680 ranks (25.0%) and 600,000 of 2,442,240 parameters are kept"
    assert "loss 1.3205, of the whole adapter 1.3215, of the base 2.7900: -0.0010 ± 0.0021" in loss
    assert order == "the order is that of path scores drawn to singular values, the best of 3 here"


def test_without_rows_nobody_knows_the_cost(report):
    kept = {"share": 0.25, "ranks": 420, "parameters": 600_000}
    (line,) = in_sentences({"whole": report["whole"], "kept": kept, "order": "values"})
    assert line.endswith("by singular values alone: no row was read, so what the cut costs is not known")


def test_an_adapter_that_hurts_and_corrections_are_said(report):
    report |= {"whole_hurts": True, "gain": -0.2}
    report["refit"] = {"loss_before": 1.33, "loss_after": 1.34, "helped": False}
    training = "a few steps of training on the rows that ordered took the loss of what was kept from 1.3300 to"
    lines = in_sentences(report)
    assert f"{training} 1.3400, so they were taken back" in lines
    report["refit"] = {"loss_before": 1.33, "loss_after": 1.31, "helped": True}
    assert f"{training} 1.3100, and stay" in in_sentences(report)
    assert "the base alone is 0.2000 ± 0.0500 nats per token better" in lines[-1]
    assert "840 ranks have the lowest loss, 1.3100" in lines[-1]


def test_a_card_says_whose_figures_are_whose(report):
    text = section(report, later=True)
    assert text.startswith("## Compression\n\n- 420 of 1,680 ranks")
    assert text.endswith("are of the whole adapter.")
    assert "of the whole adapter." not in section(report, later=False).splitlines()[-1]
    assert section({}, later=False) == ""


@pytest.mark.parametrize(("stderr", "said"), [(0.0131, 1), (0.0099, 0)])
def test_few_rows_are_said_to_tell_little(report, stderr, said):
    report["kept"]["stderr"] = stderr
    telling = "168 rows tell a difference no finer than ± 0.013"
    assert len([line for line in in_sentences(report) if line.startswith(telling)]) == said
    report["kept"]["stderr"] = 0.0  # of the whole, which stayed: what its cuts were measured by tells
    report["judged_on"]["least_stderr"] = stderr
    assert len([line for line in in_sentences(report) if line.startswith(telling)]) == said


def test_a_handful_of_rows_is_too_few_for_a_standard_error(report):
    report["judged_on"]["rows"] = 7
    assert any(line.startswith("7 rows are too few even for the standard error") for line in in_sentences(report))


def test_rows_that_decided_more_are_said_to(report):
    report["judged_on"]["also"] = "chose the weights and measure the result"
    assert in_sentences(report)[1].endswith("on 168 rows that also chose the weights and measure the result")


def test_where_every_rank_stays_no_order_won(report):
    report["order"] = None
    assert in_sentences(report)[2] == "every rank stays that adds something, so no order decided"


def test_a_single_row_is_said_to_tell_nothing(report):
    report["kept"]["stderr"] = report["gain_stderr"] = None
    report |= {"judged_on": {"rows": 1, "supervised_tokens": 5}, "whole_hurts": True, "gain": -0.2}
    lines = in_sentences(report)
    assert lines[1].endswith("-0.0010 nats per token from the whole, on 1 row that only judges")
    assert any(line.startswith("a single row has no standard error") for line in lines)
    assert "the base alone is 0.2000 nats per token better" in lines[-1]


def test_training_on_without_a_result_is_said(report):
    report["refit"] = None
    assert "nothing was trained on that stays: every rank is kept that adds something" in in_sentences(report)
    report["refit"] = {"loss_before": 1.33, "loss_after": None, "helped": False}
    assert in_sentences(report)[-1].endswith("from 1.3300 to no number, so they were taken back")


def test_one_rank_for_all_that_made_it_larger_is_said(report):
    report["kept"] |= {"share": 2.0, "ranks": 3360, "parameters": 4_884_480}
    assert in_sentences(report)[0] == (
        "3,360 ranks and 4,884,480 parameters are written, of 1,680 and 2,442,240: one rank for all fills up modules "
        "that have fewer, so leave --uniform out, or ask for a smaller size"
    )
