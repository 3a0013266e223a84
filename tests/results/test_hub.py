"""What of a folder goes to the Hub, and what is said where it does not, against a Hub on the loopback interface."""

from __future__ import annotations

import json
import shutil

import pytest
from huggingface_hub import ModelCard, constants

from qalora import cli
from qalora.card_files import write_card
from qalora.push import main
from qalora.results.card import adapter_card


@pytest.fixture
def push(capsys):
    """push(words) → (exit code, standard output, standard error)."""

    def run(*words: object) -> tuple[int, str, str]:
        code = cli.run(main, [str(word) for word in words])
        return code, *capsys.readouterr()

    return run


def test_an_adapter_goes_with_its_card_and_nothing_of_the_run(push, hub, run):
    adapter = run / "adapter"
    for name in ("optimizer.pt", "trainer_state.json", "notes.txt", "adapter_model.bin"):
        (adapter / name).write_text("x")
    code, out, err = push(run, "me/tales")
    assert code == 0, err
    assert out.strip() == f"{hub.endpoint}/me/tales/commit/abc"
    sent = hub.repos["me/tales"]["main"]
    assert sorted(sent) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "qalora.json"]
    assert sent["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert "adapter_model.bin, notes.txt, optimizer.pt, trainer_state.json" in err
    card = ModelCard(sent["README.md"].decode())
    assert card.data.to_dict() | {"tags": None} == {
        "library_name": "peft", "base_model": "huggyllama/llama-7b", "base_model_relation": "adapter",
        "datasets": ["tatsu-lab/alpaca"], "metrics": ["perplexity", "exact_match"], "pipeline_tag": "text-generation",
        "tags": None,
    }  # fmt: skip
    assert 'PeftModel.from_pretrained(base, "me/tales")' in card.text
    assert hub.private == {"me/tales": False}


def test_a_second_push_goes_to_a_branch_of_the_same_repository(push, hub, run):
    assert push(run / "adapter", "tales")[0] == 0
    assert push(run / "adapter", "tales", "--revision", "v2")[0] == 0
    assert sorted(hub.repos) == ["me/tales"]
    assert hub.repos["me/tales"]["v2"].keys() == hub.repos["me/tales"]["main"].keys()


def test_a_merged_folder_goes_without_paths_of_this_machine(push, hub, tmp_path):
    folder = tmp_path / "merged"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    report = {
        "model": "/srv/models/base",
        "adapter": "/home/me/run/adapter",
        "format": "hf",
        "dtype": "bfloat16",
        "modules": 7,
    }
    (folder / "merge.json").write_text(json.dumps(report))
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "model.safetensors").write_bytes(b"x")
    code, _, err = push(folder, "me/merged", "--private")
    assert code == 0, err
    sent = hub.repos["me/merged"]["main"]
    assert sorted(sent) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "merge.json", "model.safetensors",
        "tokenizer.json",
    ]  # fmt: skip
    assert json.loads(sent["merge.json"]) == report | {"model": "base", "adapter": "adapter"}
    assert not any(b"/home/me" in content or b"/srv" in content for content in sent.values())
    assert ModelCard(sent["README.md"].decode()).data.library_name == "transformers"
    assert hub.private == {"me/merged": True}


def test_an_adapter_of_a_local_base_names_it_without_its_place(push, hub, adapter):
    folder = adapter(base="/srv/models/my-base")
    assert push(folder, "me/lora")[0] == 0
    sent = hub.repos["me/lora"]["main"]
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "my-base"
    assert "base_model" not in ModelCard(sent["README.md"].decode()).data.to_dict()
    assert b"/srv" not in sent["README.md"]
    assert "/srv/models/my-base" in (folder / "adapter_config.json").read_text()


@pytest.mark.parametrize("where", ["here", "on the Hub"])
def test_a_readme_that_a_user_wrote_stays(push, hub, run, where):
    words = "# Mine\n\nnothing else\n"
    if where == "here":
        (run / "adapter" / "README.md").write_text(words)
    else:
        hub.repos["me/tales"] = {"main": {"README.md": words.encode()}}
        hub.private["me/tales"] = False
        write_card(run / "adapter", adapter_card(run / "adapter"))
    code, _, err = push(run, "me/tales")
    assert code == 0, err
    assert hub.repos["me/tales"]["main"]["README.md"].decode() == words
    assert "adapter_model.safetensors" in hub.repos["me/tales"]["main"]
    assert ("stays" in err) == (where == "on the Hub")


def test_a_card_of_an_earlier_push_is_replaced(push, hub, run):
    assert push(run, "me/tales")[0] == 0
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["after"]["loss"] = 1.125
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert push(run, "me/tales")[0] == 0
    assert "1.125" in hub.repos["me/tales"]["main"]["README.md"].decode()


def test_private_does_not_publish_in_a_public_repository(push, hub, run):
    hub.repos["me/tales"], hub.private["me/tales"] = {"main": {}}, False
    code, _, err = push(run, "me/tales", "--private")
    assert (code, hub.repos["me/tales"]["main"]) == (2, {})
    assert "me/tales exists and is public" in err


def test_what_cannot_be_pushed_is_refused_before_any_request(push, hub, run, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert push(tmp_path / "empty", "me/x")[0] == 2
    assert push(tmp_path / "missing", "me/x")[0] == 2
    (run / "adapter" / "adapter_model.safetensors").rename(tmp_path / "kept")
    code, _, err = push(run / "adapter", "me/x")
    assert code == 2 and "neither an adapter" in err
    shutil.move(tmp_path / "kept", run / "adapter" / "adapter_model.safetensors")
    for repo in ("me/x/y", "me//x", "-x", "a--b"):
        code, _, err = push("--", run, repo) if repo.startswith("-") else push(run, repo)
        assert code == 2 and "OWNER/NAME" in err, repo
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = push(run, "me/x")
    assert code == 2 and "HF_HUB_OFFLINE is set" in err and len(err.splitlines()) == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    code, _, err = push(run, "me/x")
    assert code == 2 and "no token" in err and len(err.splitlines()) == 1
    assert hub.requests == []
    code, out, _ = push(run, "me/x", "--dry-run")
    assert code == 0 and "adapter_model.safetensors" in out and hub.requests == []


@pytest.mark.parametrize(
    ("fails", "token", "says"),
    [
        (("/commit/", 500), None, "refused it"),
        (("/upload/", 400), None, "refused it"),
        (("/commit/", 403), None, "may not write"),
        (None, "hf_wrong", "does not accept the token"),
    ],
)
def test_a_failed_push_is_one_line_with_the_command_that_pushes_again(push, hub, run, monkeypatch, fails, token, says):
    hub.fails = fails
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    code, out, err = push(run, "me/tales", "--private")
    assert (code, out) == (1, "")
    line = err.splitlines()[-1]
    assert says in line and line.endswith(f"Push again with: qalora push {run / 'adapter'} me/tales --private")
    assert "adapter_model.safetensors" not in hub.repos.get("me/tales", {}).get("main", {})
