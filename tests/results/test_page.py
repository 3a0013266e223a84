"""The page of a run: what is on it, and what it does in a browser without network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from qalora import cli
from qalora.report import main
from qalora.results.facts import RunFacts, read_run
from qalora.results.page import render

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Before the page's own scripts: keeps what fails. After them: moves the slider, and writes down what is seen.
WATCH = """<script>
window.failures = [];
addEventListener("error", (event) => failures.push(String(event.message)));
addEventListener("unhandledrejection", (event) => failures.push(String(event.reason)));
</script>"""
LOOK = """<script>
const seen = {maps: [], said: []};
const slider = document.getElementById("round");
const look = () => {
  const map = document.getElementById("rank-map");
  seen.maps.push(map.data[0].z);
  seen.texts = [...map.querySelectorAll(".hm text")].map((text) => text.textContent);
  seen.said.push(document.getElementById("round-said").textContent);
};
look();
for (const value of [0, 1]) {
  slider.value = value;
  slider.dispatchEvent(new Event("input", {bubbles: true}));
  look();
}
const drawn = (plot) => plot.querySelectorAll("svg.main-svg").length > 0;
seen.plots = [...document.querySelectorAll(".plot")].map((plot) => [plot.id, drawn(plot)]);
seen.wide = document.documentElement.scrollWidth - innerWidth;
seen.failures = failures;
seen.loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
const found = document.createElement("pre");
found.id = "seen";
found.textContent = JSON.stringify(seen);
document.body.append(found);
</script>"""


def figures(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)[1])


def without_scripts(page: str) -> str:
    return re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)


def test_a_page_shows_what_the_files_say(run):
    page = render(read_run(run))
    shown, data = without_scripts(page), figures(page)
    assert "<h1>tales</h1>" in shown and "2.500 → 1.250" in shown and "0.0 → 66.7 %" in shown and "12 of 12" in shown
    training, validation = data["figures"]["losses"]["data"]
    assert training["x"] == list(range(1, 13)) and training["y"][0] == 2.9
    assert (validation["x"], validation["y"]) == ([12], [1.3])
    assert [shape["x0"] for shape in data["figures"]["losses"]["layout"]["shapes"]] == [4, 8]
    assert [(state["label"], state["total"]) for state in data["states"]] == [
        ("start", 12),
        ("step 4", 12),
        ("step 8", 12),
    ]
    # A row per kind, a column per block.
    assert data["states"][0]["ranks"] == [[2, 2], [2, 2], [2, 2]]
    assert data["states"][2]["ranks"] == [[2, 3], [1, 2], [4, 0]]
    assert data["states"][2]["changes"][2] == [" (+2 since the start)", " (−2 since the start)"]
    planned = [bar for bar in data["figures"]["memory"]["data"] if bar["y"] == ["planned"]]
    assert {bar["name"]: bar["x"] for bar in planned} == {"4-bit weights": [3.0], "adapter": [1.0]}
    assert data["figures"]["memory"]["data"][-1]["x"] == [1024.0]
    assert "say 0 &amp; &lt;b&gt;" in shown and "before 2" in shown and "after 2" in shown and "r2" in shown
    assert "after 3" not in shown
    assert "qalora finetune --model llama-7b --recipe alpaca lora.r=2" in shown
    assert "<th>learning_rate</th><td>0.0001</td>" in shown


def test_a_page_is_one_file_and_its_own_words_are_no_markup(run):
    facts = replace(read_run(run), name="</script><script>alert(1)</script>")
    facts = replace(facts, rounds=[{**facts.rounds[0], "step": 4}], log=[{"step": 1, "loss": float("nan")}])
    page = render(facts)
    assert "alert(1)</script>" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:)[^"']+""", without_scripts(page))
    assert figures(page)["figures"]["losses"]["data"][0]["y"] == [None]
    lone = replace(facts, after=[{"row": 0, "prompt": "\ud800", "answer": "\udfff", "reference": "x"}])
    assert render(lone).encode("utf-8")


@pytest.mark.parametrize(
    "facts", [RunFacts("new"), RunFacts("new", recipe={"model": "m", "evaluation": {"metrics": ["loss"]}})]
)
def test_a_run_that_has_just_begun_has_a_page(facts):
    page = render(facts)
    assert "<h1>new</h1>" in page and figures(page)["figures"] == {}
    assert ("exact_match, rougeL or accuracy" in page) == bool(facts.recipe)


def test_a_run_without_rounds_has_a_map_without_a_slider(run):
    facts = replace(read_run(run), rounds=(), final=dict.fromkeys(read_run(run).start, 2))
    page = render(facts)
    assert 'id="rank-map"' in page and 'type="range"' not in page
    assert "No round of allocation moved them." in page


def test_weights_of_an_earlier_round_are_a_state_of_their_own(run):
    facts = read_run(run)
    kept = replace(facts, final=dict(facts.start))
    assert [label for label, _ in kept.states] == ["start", "step 4", "step 8", "saved adapter"]
    assert [label for label, _ in facts.states] == ["start", "step 4", "step 8"]


def test_the_command_writes_the_page_of_any_run(run, tmp_path, capsys):
    assert cli.run(main, [str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert "<h1>tales</h1>" in (run / "report.html").read_text(encoding="utf-8")
    assert cli.run(main, [str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes() == (run / "report.html").read_bytes()
    for folder in (tmp_path / "nothing", run / "adapter"):
        assert cli.run(main, [str(folder)]) == 2
        assert "no run of qalora" in capsys.readouterr().err
    (run / "metrics.json").write_text("{")
    assert cli.run(main, [str(run)]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (500, True)])
def test_a_browser_without_network_draws_it_and_the_slider_moves_the_map(run, tmp_path, width, dark):
    page = render(read_run(run)).replace("<head>", f"<head>{WATCH}", 1).replace("</body>", f"{LOOK}</body>")
    file = tmp_path / "watched.html"
    file.write_text(page, encoding="utf-8")
    done = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr", f"--window-size={width},1600", *(["--force-dark-mode"] if dark else []),
            "--virtual-time-budget=5000", "--dump-dom", file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert said == []
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)[1])
    assert seen["failures"] == [] and seen["loaded"] == []
    last, first, second = seen["maps"]
    assert last == [[2, 3], [1, 2], [4, 0]]
    assert first == [[2, 2], [2, 2], [2, 2]]
    assert second == [[2, 2], [2, 2], [3, 1]]
    assert sorted(seen["texts"]) == sorted("222231")
    assert seen["said"] == ["step 8 · 12 ranks", "start · 12 ranks", "step 4 · 12 ranks"]
    assert seen["plots"] == [["losses", True], ["rank-map", True], ["speed", True], ["memory", True]]
    assert seen["wide"] <= 0


def test_the_styles_of_the_page_come_with_the_package():
    import qalora.results.page as page

    folder = Path(page.__file__).parent
    assert {file.name for file in folder.iterdir()} >= {"page.css", "page.js"}
