"""What holds for all tests; fixtures.py has what they use."""

from __future__ import annotations

import gc
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# bitsandbytes asks for torch.compile as it is imported, which no test uses: a second or two of every process.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

# The files that take longest, the longest first.
LONGEST = [
    "test_finetune.py", "test_smollm2.py", "test_fake_cuda.py", "test_families.py", "test_merging.py", "test_memory.py",
    "test_api.py", "test_processes.py", "test_scoring.py", "test_wrapper.py", "test_settings.py", "test_turn_ends.py",
    "test_quiet.py", "test_verification.py", "test_compress.py", "test_notebook.py", "test_docs.py", "test_page.py",
    "test_finish.py", "test_block_memory.py", "test_variable_ranks.py", "test_certified.py", "test_models.py",
    "test_score.py", "test_package.py", "test_sharing.py", "test_gguf_reader.py", "test_watch.py", "test_pictures.py",
]  # fmt: skip


def pytest_configure(config):
    """The fixtures are for processes that run tests. The one of pytest-xdist that hands them out runs none: what
    fixtures.py imports would keep it, and all others with it, for ten seconds."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    spec = spec_from_file_location("tests.fixtures", Path(__file__).with_name("fixtures.py"))
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    config.pluginmanager.register(module, spec.name)


def pytest_collection_modifyitems(items):
    """The longest files first: at the end they would keep one worker busy while the others wait."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish():
    """Each training run collects garbage. What the imports left is none, and to look through it takes a third of a
    second."""
    gc.collect()
    gc.freeze()
