"""What a real run of a tiny LLaMA leaves for people: its card, its page, and what it pushes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from qalora import cli, merge
from qalora.card_files import CARD, is_ours
from qalora.finetune import main
from qalora.recipe import load_recipe

SETTINGS = (
    "data.train=rows.jsonl", "data.val_set_size=4", "data.max_seq_len=32", "lora.r=2", "lora.alpha=4",
    "lora.init=kaiming", "allocation.rounds=1", "allocation.warmup=2", "allocation.interval=1",
    "allocation.val_batch_size=2", "training.max_steps=4", "training.micro_batch_size=2",
    "training.gradient_accumulation_steps=1", "training.learning_rate=5e-3",
    "training.eval_steps=2", "training.save_steps=2", "logging.steps=1", "logging.quiet=true",
    "evaluation.metrics=[loss,rougeL]", "evaluation.max_new_tokens=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory, save_tiny_llama) -> Path:
    """A folder with a model, rows and a recipe, where a user would stand."""
    folder = tmp_path_factory.mktemp("here")
    save_tiny_llama(folder / "tiny")
    rows = [{"prompt": f"{i} and {i + 1}: ", "completion": str(2 * i + 1)} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text("training: {seed: 3}\n")
    return folder


@pytest.fixture
def finetune(here, monkeypatch):
    """run(*more, output=…) → (exit code, the run's folder), from `here`."""
    monkeypatch.chdir(here)

    def run(*more: str, output: str) -> tuple[int, Path]:
        words = [
            "--model",
            "tiny",
            "--recipe",
            "mine.yaml",
            "--dtype",
            "float32",
            *SETTINGS,
            "--output-dir",
            output,
            *more,
        ]
        return cli.run(main, words), here / output

    return run


@pytest.fixture(scope="module")
def finished(here) -> Path:
    """The folder of a run with merged weights; to be read, and copied to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        places = ["--model", str(here / "tiny"), "--recipe", str(here / "mine.yaml"), "--dtype", "float32"]
        assert cli.run(main, [*places, *SETTINGS, "merge=true", "--output-dir", "finished"]) == 0
    return here / "finished"


def test_a_run_ends_with_a_card_a_page_and_its_log(finished, here):
    text = (finished / "adapter" / CARD).read_text()
    assert is_ours(text) and str(here) not in text and "More Information" not in text
    metrics = json.loads((finished / "metrics.json").read_text())
    loss = f"| loss (nats per token) | {metrics['before']['loss']:,.4g} | {metrics['after']['loss']:,.4g} |"
    assert loss in text and "12 trained on, 4 held back" in text
    assert ModelCard(text).data.library_name == "peft"
    ranks = {
        name.split("base_model.model.")[1].removesuffix(".lora_A.weight"): len(tensor)
        for name, tensor in load_file(finished / "adapter" / "adapter_model.safetensors").items()
        if "lora_A" in name
    }
    assert f"{sum(ranks.values()):,} ranks in {len(ranks)} linear layers" in text or len(set(ranks.values())) == 1
    log = [json.loads(line) for line in (finished / "log_history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]
    assert "rougeL" in (finished / "report.html").read_text() and metrics["plan"]["total"] > 0
    merged = (finished / "merged" / CARD).read_text()
    report = json.loads((finished / "merged" / "merge.json").read_text())
    assert is_ours(merged) and f"| largest logit difference | {report['max_logit_difference']:.3g} |" in merged
    assert loss in merged and str(here) not in merged


def test_the_command_of_a_card_repeats_the_run_exactly(finished, here, monkeypatch):
    """Its words as they stand, and also with the settings of the card in the place of the user's own recipe."""
    card = (finished / "adapter" / CARD).read_text()
    command = shlex.split(re.search(r"```bash\n(qalora finetune .*?)\n```", card)[1])
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    monkeypatch.chdir(here)
    (here / "settings.yaml").write_text(yaml.safe_dump(settings))
    resolved = load_recipe("settings.yaml", [("model", "tiny")]).model_dump()
    by_command = load_recipe("finished/recipe.yaml", []).model_dump()
    unlike = {name for name in resolved if resolved[name] != by_command[name]}
    assert unlike <= {"model", "output_dir"}
    assert cli.run(main, [*command[2:], "--output-dir", "repeated"]) == 0
    first, second = (
        load_file(here / name / "adapter" / "adapter_model.safetensors") for name in ("finished", "repeated")
    )
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_users_cards_outlive_a_resumed_run_and_a_second_merge(finished, finetune, here):
    run = Path(shutil.copytree(finished, here / "resumed"))
    for folder in ("adapter", "merged"):
        (run / folder / CARD).write_text("# Mine\n")
    assert finetune("merge=true", "--resume-from-checkpoint", "auto", output="resumed")[0] == 0
    assert [(run / folder / CARD).read_text() for folder in ("adapter", "merged")] == ["# Mine\n", "# Mine\n"]
    (run / "merged" / CARD).unlink()
    words = ["--model", "tiny", "--adapter", str(run / "adapter"), "--output", str(run / "merged"), "--no-verify"]
    assert cli.run(merge.main, words) == 0
    assert "was not compared" in (run / "merged" / CARD).read_text()


def test_a_run_is_pushed_at_its_end_and_a_failed_push_loses_nothing(finetune, hub, capsys):
    code, run = finetune("--push-to-hub", "me/tales", "hub_private_repo=true", output="pushed")
    assert (code, hub.private) == (0, {"me/tales": True})
    sent = hub.repos["me/tales"]["main"]
    assert sorted(sent) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "qalora.json"]
    assert sent["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert b"me/tales" in sent["README.md"] and b"hub_" not in sent["README.md"]
    hub.fails = ("/commit/", 500)
    capsys.readouterr()
    code, run = finetune("hub_model_id=me/other", "--resume-from-checkpoint", "auto", output="pushed")
    line = capsys.readouterr().err.splitlines()[-1]
    assert code == 1 and f"Push again with: qalora push {run / 'adapter'} me/other" in line.replace(
        "qalora push pushed", f"qalora push {run}"
    )
    assert (run / "report.html").is_file() and is_ours((run / "adapter" / CARD).read_text())


def test_a_push_that_cannot_be_is_refused_before_anything_is_read(finetune, monkeypatch, capsys):
    monkeypatch.setattr("qalora.training.rows.load_data", lambda *args, **options: pytest.fail("read"))
    code, run = finetune("--push-to-hub=me/tales", output="refused")
    assert code == 2 and "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize(
    ("settings", "repository"),
    [
        ([], None),
        ([("hub_model_id", "me/x")], "me/x"),
        ([("push_to_hub", True), ("hub_model_id", "me/x")], "me/x"),
        ([("push_to_hub", False), ("hub_model_id", "me/x")], None),
        ([("push_to_hub", True)], "tales"),
    ],
)
def test_where_a_run_is_pushed(settings, repository):
    recipe = load_recipe("quickstart", [("model", "smollm2-135m"), ("output_dir", "outputs/tales"), *settings])
    assert recipe.repository() == repository
