"""A run's folder without any training, and a Hub on the loopback interface."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import save_file

from qalora.adapter.provenance import Provenance
from qalora.training.identity import Identity, Rows

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
MODULES = [f"model.layers.{block}.{kind}" for block in range(2) for kind in KINDS]
RANKS = dict(zip(MODULES, (2, 1, 4, 3, 2, 0), strict=True))
SETTINGS = {
    "model": "llama-7b",
    "output_dir": "/home/somebody/secret/tales",
    "merge": False,
    "data": {"train": "tatsu-lab/alpaca", "validation": None, "prompt_template": "/no_think {a}/{b}"},
    "quantization": {"load_in_4bit": True},
    "lora": {"r": 2, "alpha": 4, "adapter": None},
    "allocation": {"rounds": 2},
    "training": {
        "micro_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-4, "lr_scheduler_type": "linear",
        "seed": 7,
    },
    "evaluation": {"metrics": ["loss", "exact_match"]},
    "logging": {"steps": 1},
}  # fmt: skip
COMMAND = "# qalora finetune --model llama-7b --recipe alpaca lora.r=2\n"
METRICS = {
    "before": {"rows": 3, "supervised_tokens": 30, "loss": 2.5, "perplexity": 12.18, "exact_match": 0.0},
    "after": {"rows": 3, "supervised_tokens": 30, "loss": 1.25, "perplexity": 3.49, "exact_match": 66.7},
    "train": {
        "steps": 12, "seconds": 90.0, "rows": 96, "tokens": 1234, "tokens_per_second": 13.7, "peak_memory_bytes": 2**30,
    },
    "plan": {
        "device": "cpu", "seq_len": 64, "terms": {"4-bit weights": 3 * 2**20, "adapter": 2**20}, "total": 4 * 2**20,
    },
    "allocation": {"rounds": 2, "seconds": 1.0, "share": 0.01, "budget": 12, "total_rank": 12},
}  # fmt: skip


def write_lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_adapter(folder: Path, ranks: dict[str, int], base: str = "huggyllama/llama-7b") -> Path:
    """A plain PEFT LoRA, with the files that PEFT writes."""
    folder.mkdir(parents=True)
    live = {name: rank for name, rank in ranks.items() if rank}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": max(live.values()),
        "lora_alpha": 2 * max(live.values()), "rank_pattern": live,
        "target_modules": [kind.split(".")[1] for kind in KINDS],
        "alpha_pattern": {name: 2 * rank for name, rank in live.items()},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for name, rank in live.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(rank, 8)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(8, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def adapter(tmp_path):
    """make(ranks, base, name) → the folder of a plain PEFT LoRA that no run of ours made."""

    def make(ranks: dict[str, int] = RANKS, base: str = "huggyllama/llama-7b", name: str = "lora") -> Path:
        return write_adapter(tmp_path / name, ranks, base)

    return make


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a finished run of two rounds, with a checkpoint."""
    folder = tmp_path / "tales"
    folder.mkdir()
    start = dict.fromkeys(MODULES, 2)
    rows = Rows(tuple(bytes([i]) * 8 for i in range(5)), (b"a" * 8,) * 2, "v")
    Identity("llama-7b", None, 12, 2, start, rows, run="one").write(folder)
    (folder / "recipe.yaml").write_text(COMMAND + yaml.safe_dump(SETTINGS, sort_keys=False))
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    middle = start | {MODULES[2]: 3, MODULES[5]: 1}
    rounds = [
        {"step": step, "ranks": {name: rank for name, rank in ranks.items() if rank}, "total_rank": sum(ranks.values())}
        for step, ranks in ((4, middle), (8, RANKS))
    ]
    write_lines(folder / "allocation.jsonl", rounds)
    log = [{"step": step, "loss": 3 - step / 10, "tokens_per_second": 10.0 + step} for step in range(1, 13)]
    write_lines(folder / "log_history.jsonl", [*log, {"step": 12, "eval_loss": 1.3}])
    answers = [{"row": row, "prompt": f"say {row} & <b>", "reference": f"r{row}"} for row in range(4)]
    for when in ("before", "after"):
        said = [{**line, "answer": f"{when} {line['row']}", "exact_match": 0.0} for line in answers]
        write_lines(folder / f"predictions-{when}.jsonl", said)
    write_adapter(folder / "adapter", RANKS)
    Provenance("huggyllama/llama-7b", "nf4", True, "bfloat16", stop_tokens=("</s>",)).write(folder / "adapter")
    checkpoint = folder / "checkpoint-12"
    checkpoint.mkdir()
    (checkpoint / "optimizer.pt").write_bytes(b"moments")
    return folder


@dataclass
class FakeHub:
    """What a Hub was sent.

    Attributes:
        repos: OWNER/NAME → branch → file → content.
        private: OWNER/NAME → whether it is.
        fails: (part of a path, status) of a request that is refused.
    """

    token: str = "hf_write"
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fails: tuple[str, int] | None = None
    endpoint: str = ""


@pytest.fixture
def hub(monkeypatch):
    """A FakeHub, which the Hub's client talks to."""
    state = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in (("ENDPOINT", state.endpoint), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", state.token)
    yield state
    server.shutdown()
    server.server_close()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    """The calls of huggingface_hub that make a repository and commit to it, small files inline and large ones over
    LFS."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, value, status: int = 200, **headers: str) -> None:
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def refused(self) -> bool:
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            if hub.fails and hub.fails[0] in path:
                self.answer({"error": "refused"}, hub.fails[1])
                return True
            if self.headers.get("Authorization") != f"Bearer {hub.token}" and not path.startswith("/upload/"):
                self.answer({"error": "Invalid credentials"}, 401)
                return True
            return False

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self):
            content = self.body()
            if self.refused():
                return
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts == ["api", "repos", "create"]:
                self.create(json.loads(content))
            elif parts == ["api", "validate-yaml"]:
                self.answer({"errors": [], "warnings": []})
            elif parts[:2] == ["api", "models"] and parts[4] == "preupload":
                files = json.loads(content)["files"]
                large = [file["path"].endswith((".safetensors", ".gguf")) for file in files]
                modes = ["lfs" if is_large else "regular" for is_large in large]
                found = [
                    {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                    for file, mode in zip(files, modes, strict=True)
                ]
                self.answer({"files": found})
            elif parts[:2] == ["api", "models"] and parts[4] == "branch":
                hub.repos["/".join(parts[2:4])].setdefault(parts[5], {})
                self.answer({})
            elif parts[:2] == ["api", "models"] and parts[4] == "commit":
                self.commit("/".join(parts[2:4]), parts[5], content)
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**found, "actions": {"upload": {"href": f"{hub.endpoint}/upload/{found['oid']}"}}}
                    for found in json.loads(content)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": objects})
            else:
                self.answer({"error": self.path}, 404)

        def create(self, asked: dict) -> None:
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in hub.repos:
                self.answer({"error": "You already created this model repo"}, 409)
                return
            hub.repos[name] = {"main": {}}
            hub.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.answer({"url": f"{hub.endpoint}/{name}", "name": name, "id": "1"})

        def commit(self, repo: str, branch: str, content: bytes) -> None:
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.repos[repo][branch][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.repos[repo][branch][value["path"]] = hub.blobs[value["oid"]]
            self.answer({"commitUrl": f"{hub.endpoint}/{repo}/commit/abc", "commitOid": "abc", "hookOutput": ""})

        def do_PUT(self):
            content = self.body()
            if self.refused():
                return
            oid = self.path.rpartition("/")[2]
            assert hashlib.sha256(content).hexdigest() == oid
            hub.blobs[oid] = content
            self.answer({})

        def do_GET(self):
            if self.refused():
                return
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts == ["api", "whoami-v2"]:
                self.answer({"name": "me", "type": "user"})
            elif parts[:2] == ["api", "models"]:
                name = "/".join(parts[2:4])
                self.answer({"id": name, "private": hub.private[name], "sha": "abc", "siblings": []})
            elif len(parts) == 5 and parts[2] == "resolve":
                found = hub.repos["/".join(parts[:2])].get(parts[3], {}).get(parts[4])
                if found is None:
                    self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
                else:
                    self.answer(found, ETag='"abc"', X_Repo_Commit="a" * 40)
            else:
                self.answer({"error": self.path}, 404)

        do_HEAD = do_GET

    return Handler
