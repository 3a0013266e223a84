"""The generated task: its record follows from the order, its splits share no combination, its rows no surprise."""

from __future__ import annotations

import re

import pytest

from qalora.data.quickstart import SIZES, rows

RECORD = re.compile(
    r"#ORD<(?P<item>\w+)\*(?P<count>\d+)\|(?P<colour>\w+)> @(?P<city>\w+) ~(?P<day>\w{3}) :: (?P<name>\w+)"
)


def orders(seed: int, split: str) -> list[dict[str, str]]:
    return [RECORD.fullmatch(row["completion"]).groupdict() for row in rows(seed, SIZES[split], split)]


@pytest.mark.parametrize("split", SIZES)
def test_every_record_is_the_order_in_its_sentence(split):
    for row in rows(0, SIZES[split], split):
        order = RECORD.fullmatch(row["completion"]).groupdict()
        sentence = row["prompt"]
        assert f"{order['count']} {order['colour']} {order['item']}s " in sentence
        for name in ("name", "city"):
            assert re.search(rf"\b{order[name]}\b", sentence)
        assert re.search(rf"\b{order['day']}\w*day\b", sentence)


def test_no_combination_of_name_and_item_is_in_both_splits():
    def combinations(seed, split):
        return {(order["name"], order["item"]) for order in orders(seed, split)}

    for seed in (0, 1):
        assert not combinations(0, "train") & combinations(seed, "validation")


def test_rows_follow_from_seed_and_count_alone():
    assert rows(5, 20, "train") == rows(5, 20, "train")
    assert rows(5, 20, "train")[:7] == rows(5, 7, "train")
    assert rows(5, 20, "train") != rows(6, 20, "train")


def test_one_row_is_as_the_documentation_shows():
    sentences = {row["prompt"]: row["completion"] for row in rows(0, 2000, "train")}
    pattern = r"Please send (\w+) (\d+) (\w+) (\w+)s to (\w+) by (\w{3})\w+\."
    matched = [(m.groups(), sentences[m.string]) for m in map(re.compile(pattern).fullmatch, sentences) if m]
    assert len(matched) > 100
    for (name, count, colour, item, city, day), record in matched:
        assert record == f"#ORD<{item}*{count}|{colour}> @{city} ~{day} :: {name}"
