"""The quickstart task: orders in plain words → records in a notation that exists nowhere else.

    Please send Mara 3 red mugs to Oslo by Friday.   →   #ORD<mug*3|red> @Oslo ~Fri :: Mara

Every row is generated here, from a seed. A pretrained model cannot know the notation, so it starts at 0 % exact match,
and needs only to learn to copy and to reorder.
"""

from __future__ import annotations

import random
from itertools import product

# fmt: off
NAMES = (
    "Mara", "Tom", "Ines", "Lars", "Nora", "Omar", "Yuki", "Anna", "Paul", "Zoe",
    "Igor", "Lena", "Hugo", "Rosa", "Finn", "Vera", "Karl", "Mina", "Otto", "Dana",
)
ITEMS = ("mug", "lamp", "chair", "book", "shirt", "vase", "clock", "bag", "plate", "scarf", "pillow", "kettle")
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "purple", "orange")
CITIES = (
    "Oslo", "Paris", "Rome", "Berlin", "Madrid", "Vienna", "Dublin", "Lisbon", "Prague", "Athens", "Warsaw", "Zurich",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# fmt: on
SENTENCES = (
    "Please send {name} {count} {colour} {items} to {city} by {day}.",
    "{name} in {city} needs {count} {colour} {items} before {day}.",
    "By {day}, ship {count} {colour} {items} to {name} in {city}.",
    "An order from {city}: {name} wants {count} {colour} {items} on {day}.",
)
RECORD = "#ORD<{item}*{count}|{colour}> @{city} ~{day:.3} :: {name}"
SIZES = {"train": 2000, "validation": 132}


def rows(seed: int, count: int, split: str) -> list[dict[str, str]]:
    """`count` rows with prompt and completion; no order is both in train and in validation, whatever their seeds."""
    pairs = list(product(NAMES, ITEMS))
    random.Random(0).shuffle(pairs)
    # A pair of name and item belongs to one split, so validation asks for combinations that were never seen.
    cut = len(pairs) // 5
    pairs = {"validation": pairs[:cut], "train": pairs[cut:]}[split]
    rng = random.Random(f"{seed} {split}")
    return [_row(rng, *rng.choice(pairs)) for _ in range(count)]


def _row(rng: random.Random, name: str, item: str) -> dict[str, str]:
    order = {
        "name": name,
        "item": item,
        "count": rng.randint(2, 20),
        "colour": rng.choice(COLOURS),
        "city": rng.choice(CITIES),
        "day": rng.choice(DAYS),
    }
    sentence = rng.choice(SENTENCES).format(items=f"{item}s", **order)
    return {"prompt": sentence, "completion": RECORD.format(**order)}
