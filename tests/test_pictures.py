from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes

from qalora.pictures import draw_compression, draw_loss, draw_ranks

MAPS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MAPS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def llama(blocks: int, rank: int = 8) -> dict[str, int]:
    return {f"model.layers.{i}.{name}": rank for i in range(blocks) for name in MAPS}


@pytest.fixture
def drawn(monkeypatch):
    """The texts and images that are drawn on any axes."""
    seen: dict[str, list] = {"text": [], "image": [], "line": []}
    text, imshow, plot, axvline = Axes.text, Axes.imshow, Axes.plot, Axes.axvline

    def record_text(self, x, y, s, *args, **kwargs):
        seen["text"].append((round(x), round(y), s))
        return text(self, x, y, s, *args, **kwargs)

    def record_image(self, cells, *args, **kwargs):
        image = imshow(self, cells, *args, **kwargs)
        seen["image"].append((np.array(cells), image))
        return image

    def record_plot(self, x, y, **kwargs):
        seen["line"].append((kwargs.get("label"), list(x), list(y)))
        return plot(self, x, y, **kwargs)

    def record_mark(self, x, **kwargs):
        seen["line"].append(("mark", x, None))
        return axvline(self, x, **kwargs)

    monkeypatch.setattr(Axes, "text", record_text)
    monkeypatch.setattr(Axes, "imshow", record_image)
    monkeypatch.setattr(Axes, "plot", record_plot)
    monkeypatch.setattr(Axes, "axvline", record_mark)
    return seen


def test_cells_show_rank_and_change_and_the_colour_is_centred_on_the_start(tmp_path, drawn):
    start = llama(2)
    ranks = start | {"model.layers.0.self_attn.q_proj": 12, "model.layers.1.mlp.down_proj": 3}
    del ranks["model.layers.1.self_attn.k_proj"]
    draw_ranks(ranks, start, tmp_path / "ranks.png")

    ((cells, image),) = drawn["image"]
    expected = np.zeros((2, 7))
    expected[0, 0], expected[1, 6], expected[1, 1] = 4, -5, -8
    np.testing.assert_array_equal(cells, expected)
    assert image.norm(0) == 0.5
    at = {(x, y): [s for a, b, s in drawn["text"] if (a, b) == (x, y)] for x in range(7) for y in range(2)}
    assert at[0, 0] == ["12", "+4"]
    assert at[1, 1] == ["0", "−8"]
    assert at[2, 0] == ["8", ""]


@pytest.mark.parametrize("blocks", [2, 32, 80])
def test_every_row_has_height_to_read(tmp_path, blocks):
    draw_ranks(llama(blocks), llama(blocks), tmp_path / "ranks.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "ranks.png").shape
    assert width == 1275
    assert height / blocks > 36  # pixels a row, at least a quarter of an inch


def test_empty_module_is_dark_whatever_the_colour_map_says(tmp_path):
    start = llama(2)
    ranks = {name: rank for name, rank in start.items() if "gate" not in name}
    draw_ranks(ranks, start, tmp_path / "empty.png")
    draw_ranks(start, start, tmp_path / "full.png")
    dark = [(matplotlib.image.imread(tmp_path / f"{n}.png")[..., :3] < 0.25).all(-1).mean() for n in ("empty", "full")]
    assert dark[0] > 0.05 > 2 * dark[1]


def test_loss_curves_and_marks(tmp_path, drawn):
    log = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}, {"step": 20, "eval_loss": 2.5}]
    log += [{"step": 20, "train_loss": 9.0}]
    draw_loss(log, [10, 15], tmp_path / "loss.png")
    assert ("training", [10, 20], [3.0, 2.0]) in drawn["line"]
    assert ("validation", [20], [2.5]) in drawn["line"]
    assert [x for label, x, _ in drawn["line"] if label == "mark"] == [10, 15]
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_loss_with_total_rank_panel(tmp_path, drawn, monkeypatch):
    steps = []
    step = Axes.step

    def record(self, x, y, **kwargs):
        steps.append((x, y))
        return step(self, x, y, **kwargs)

    monkeypatch.setattr(Axes, "step", record)
    log = [{"step": 30, "loss": 3.0}]
    draw_loss(log, [10], tmp_path / "loss.png", total_rank={0: 112, 10: 110}, budget=112)
    assert steps == [([0, 10, 30], [112, 110, 110])]


def test_nothing_logged_still_gives_a_picture(tmp_path):
    draw_loss([], [], tmp_path / "loss.png")
    assert matplotlib.image.imread(tmp_path / "loss.png").shape[:2] == (675, 1200)


def test_a_cut_shows_every_curve_and_what_was_taken(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr("qalora.pictures._save", lambda figure, path: figures.append(figure))
    points = [{"share": share, "loss": 1 + 0.1 / share, "stderr": 0.05} for share in (1.0, 0.5, 0.25)]
    worse = [{**point, "loss": point["loss"] + 1} for point in points]
    ranks, start = {"model.layers.0.mlp.up_proj": 2}, {"model.layers.0.mlp.up_proj": 8}
    losses = {"whole": 1.1, "base": 9.0}
    draw_compression({"path": points, "values": worse}, ("path", points[2]), losses, ranks, start, tmp_path / "a.png")
    draw_compression({}, None, {}, ranks, start, tmp_path / "b.png")
    curves, rank_map = figures[0].axes[:2]
    lines = {line.get_label(): line.get_xydata().tolist() for line in curves.lines}
    assert lines["path scores"] == [[point["share"], point["loss"]] for point in points]
    assert lines["singular values"] == [[point["share"], point["loss"]] for point in worse]
    assert lines["whole adapter"][0][1] == 1.1
    assert "base alone" not in lines  # far above all, it would flatten the rest
    assert [points[2]["share"], points[2]["loss"]] in [line.get_xydata()[0].tolist() for line in curves.lines]
    assert "2" in [text.get_text() for text in rank_map.texts]
    assert len(figures[1].axes) == 2  # the map and its scale
