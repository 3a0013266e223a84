"""What other libraries say reaches the user, but for the lines that ask nothing of him."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from qalora.quiet import DATASETS_BARS, LIBRARIES, LOGGED, hide_noise, noise_hidden, without


@pytest.fixture
def heard():
    """The lines that the hidden loggers let through, in the order they were said."""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    handler = Handler()
    loggers = [logging.getLogger(name) for name in LOGGED]
    for logger in loggers:
        logger.addHandler(handler)
    yield said
    for logger in loggers:
        logger.removeHandler(handler)
    hide_noise(verbose=True, environ={})


def say_all(text: str = "{}") -> list[str]:
    lines = [(name, text.format(beginning)) for name, beginnings in LOGGED.items() for beginning in beginnings]
    for name, line in lines:
        logging.getLogger(name).warning(line)
    return [line for _, line in lines]


def test_only_the_named_lines_are_hidden(heard):
    environ: dict[str, str] = {}
    hide_noise(environ=environ)
    say_all("{} and more")
    assert heard == []
    assert say_all("a real problem: {}") == heard
    assert environ == {DATASETS_BARS: "1"}


@pytest.mark.parametrize("by_the_command", [False, True])
def test_a_call_hides_them_while_it_lasts(heard, by_the_command):
    if by_the_command:
        hide_noise(environ={})
    with noise_hidden():
        say_all()
    assert heard == []
    said = say_all()
    assert heard == ([] if by_the_command else said)


@pytest.mark.parametrize(("verbose", "environ"), [(True, {}), (False, {"TRANSFORMERS_VERBOSITY": "warning"})])
def test_the_user_can_have_them_back(heard, verbose, environ):
    hide_noise(environ={})
    hide_noise(verbose=verbose, environ=environ)
    assert say_all() == heard
    assert DATASETS_BARS not in environ


@pytest.mark.parametrize("logger", LOGGED)
def test_the_installed_libraries_say_these_lines(logger):
    """Else an upgrade has changed a line, or there is nothing to hide any more."""
    source = Path(importlib.util.find_spec(logger).origin).read_text(encoding="utf-8")
    source = re.sub(r'"\s+f?"', "", source)  # strings in several lines
    assert all(beginning in source for beginning in LOGGED[logger])


def test_deprecations_between_libraries_are_hidden_and_nothing_else():
    def told(text: str, kind: type[Warning], module: str) -> bool:
        with warnings.catch_warnings(record=True) as seen:
            warnings.resetwarnings()
            hide_noise(environ={})
            warnings.warn_explicit(text, kind, "file.py", 1, module=module, registry={})
        return bool(seen)

    deprecation = "`is_gradient_checkpointing` is deprecated and will be removed in v6."
    assert not any(told(deprecation, FutureWarning, f"{library}.part") for library in LIBRARIES)
    assert told(deprecation, FutureWarning, "my_script") and told(deprecation, FutureWarning, "torchvision.part")
    assert told("adapter keys are missing", UserWarning, "peft.part")
    assert told("numbers differ", FutureWarning, "torch.part")


def test_lines_are_hidden_for_a_while(caplog):
    with without("somebody", "One thing"):
        logging.getLogger("somebody").warning("One thing and more")
        logging.getLogger("somebody").warning("another")
    logging.getLogger("somebody").warning("One thing again")
    assert [record.getMessage() for record in caplog.records] == ["another", "One thing again"]


# What a finetune says, line by line; {…} stands for figures.
LINES = [
    r"rows\.jsonl \(train\): 24 rows, \d+ tokens, \d+ of them supervised",
    r"4 optimizer steps, \d+ an epoch; rounds of allocation after steps \[2\]",
    r"for \S+ GiB and rows of up to \d+ tokens: training\.gradient_checkpointing=false",
    r"what ends an answer, as these rows teach it: '</s>'",
    r"before: rows 4  supervised_tokens \d+  loss \S+  perplexity \S+  exact_match \S+",
    r"round 1/1 after step 2: \d+ ranks pruned, \d+ grown in \d+ modules, total \d+ of \d+ \(.* s, \d+ forwards, \w+\)",
    r"step [24]/4  loss \S+  grad norm \S+  lr \S+  ranks \d+  \d+ tokens/s",
    r"step [24]/4  validation loss \S+",
    r"after:  rows 4  supervised_tokens \d+  loss \S+  perplexity \S+  exact_match \S+",
    r"run/adapter: a plain PEFT LoRA, total rank \d+ of \d+",
]


@pytest.fixture(scope="module")
def odd_llama(save_tiny_llama, tmp_path_factory):
    """A folder with Hub files of 2023, which transformers has much to say about, and rows beside it."""
    folder = tmp_path_factory.mktemp("quiet")
    model = save_tiny_llama(folder / "model")
    generation = {"temperature": 0.6, "top_p": 0.9, "max_length": 64, "bos_token_id": 1, "eos_token_id": 1}
    (model / "generation_config.json").write_text(json.dumps({**generation, "transformers_version": "4.31.0"}))
    file = model / "tokenizer_config.json"
    old = {"model_max_length": 8, "clean_up_tokenization_spaces": True, "tokenizer_class": "LlamaTokenizer"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **old}))
    rows = ({"instruction": f"Square the number {i}.", "input": "", "output": str(i * i)} for i in range(24))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def arguments(odd_llama, monkeypatch) -> list[str]:
    """Of a short finetune in the folder of the model."""
    monkeypatch.chdir(odd_llama)
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    settings = [
        "data.train=rows.jsonl", "data.val_set_size=4", "data.max_seq_len=256", "training.max_steps=4",
        "training.eval_steps=2", "training.micro_batch_size=4", "training.gradient_accumulation_steps=1",
        "allocation.rounds=1", "logging.steps=2", "allocation.warmup=0.4", "allocation.interval=0.2",
        "allocation.val_batch_size=4", "evaluation.metrics=[loss, exact_match]", "evaluation.rows=4",
        "evaluation.max_new_tokens=4",
    ]  # fmt: skip
    return ["--model", "model", "--recipe", "alpaca", "--output-dir", "run", "--overwrite", *settings]


def test_a_finetune_says_only_what_it_means(arguments):
    """In a process of its own, as a user starts it."""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-m", "qalora", "finetune", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    kinds = [next((kind for kind in LINES if re.fullmatch(kind, line)), line) for line in lines]
    assert set(kinds) == set(LINES)
    assert len(lines) == len(LINES) + 2  # two steps, and two validations


def test_verbose_brings_the_libraries_back(arguments, odd_llama, launch):
    run = launch(1, *arguments, "--verbose", "evaluation.before=false", code=f"os.chdir({str(odd_llama)!r})")
    assert run.codes == [0], run.said
    for said in (
        "generation flags are not valid",
        "`is_gradient_checkpointing` is deprecated",
        "new PAD/BOS/EOS tokens",
    ):
        assert said in run.said[0]
