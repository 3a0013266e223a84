"""An adapter or a merged folder → a model repository on the Hub: which files belong there, and one commit with them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from qalora import __version__
from qalora.adapter.provenance import FILE as PROVENANCE
from qalora.base.registry import read_fields
from qalora.card_files import CARD, is_ours, is_users, is_users_text, sealed, unsealed
from qalora.deploy.output import REPORT
from qalora.errors import AnswerNo, InputError
from qalora.results.card import card_of
from qalora.results.card_sections import HERE
from qalora.results.compression import COMPRESSION, PICTURE
from qalora.results.facts import without_paths

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ADAPTER = "adapter_config.json"
# What a server or a tokenizer reads beside the weights.
BESIDE = (
    CARD, REPORT, COMPRESSION, PICTURE, PROVENANCE, "LICENSE*", "NOTICE*", "USE_POLICY*", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json",
    "chat_template.*", "additional_chat_templates/*",
)  # fmt: skip
WEIGHTS = {
    "adapter": ("adapter_model*.safetensors",),
    "model": ("model*.safetensors",),
    "gguf": ("*.gguf",),
}
SETTINGS = {
    "adapter": (ADAPTER, "adapter_model.safetensors.index.json"),
    "model": ("config.json", "generation_config.json", "model.safetensors.index.json"),
    "gguf": ("Modelfile",),
}
# Fields of the files that may name a place on this machine.
PLACES = {
    ADAPTER: ("base_model_name_or_path",),
    PROVENANCE: ("model",),
    REPORT: ("model", "adapter"),
    COMPRESSION: ("model", "adapter"),
}


@dataclass(frozen=True)
class Upload:
    """
    Attributes:
        folder: where the files are.
        kind: adapter, model or gguf.
        files: name in the repository → the file, or what stands in its place.
        left_out: names in the folder that do not go along.
        own_card: whether README.md is not a user's.
    """

    folder: Path
    kind: str
    files: dict[str, Path | bytes]
    left_out: list[str]
    own_card: bool

    def size(self, name: str) -> int:
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def contents(folder: str | Path, repo: str) -> Upload:
    """What of a folder belongs on the Hub. A run's folder stands for its adapter.

    Raises:
        InputError: neither an adapter nor a merged folder.
    """
    path = Path(folder).expanduser()
    if not (path / ADAPTER).is_file() and (path / "adapter" / ADAPTER).is_file():
        path = path / "adapter"
    kind = kind_of(path)
    if kind is None:
        raise InputError(
            f"{folder}: neither an adapter (adapter_config.json and adapter_model.safetensors) nor a merged folder "
            "(config.json and model.safetensors, or a .gguf file); pass the adapter/ or merged/ of a run."
        )
    patterns = (*WEIGHTS[kind], *SETTINGS[kind], *BESIDE)
    found = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
    files: dict[str, Path | bytes] = {
        file.relative_to(path).as_posix(): published(file) for file in found if file != path / CARD
    }
    users = is_users(path / CARD)
    if users:
        files[CARD] = path / CARD
    elif card := _card(path, repo):
        files[CARD] = card
    there = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    left_out = sorted(name for name in there if name not in files and not name.startswith("."))
    return Upload(path, kind, files, left_out, own_card=not users)


def kind_of(folder: Path) -> str | None:
    """adapter, model or gguf; None of any other folder."""
    for kind, settings in (("adapter", ADAPTER), ("model", "config.json"), ("gguf", None)):
        if settings and not (folder / settings).is_file():
            continue
        if any(True for pattern in WEIGHTS[kind] for _ in folder.glob(pattern)):
            return kind
    return None


def published(file: Path) -> Path | bytes:
    """The file, or its text where it names places on this machine."""
    if file.name not in PLACES:
        return file
    fields = read_fields(file)
    public = {name: without_paths(fields[name]) for name in PLACES[file.name] if isinstance(fields.get(name), str)}
    if all(fields[name] == value for name, value in public.items()):
        return file
    return (json.dumps(fields | public, indent=2) + "\n").encode()


def _card(folder: Path, repo: str) -> bytes | None:
    """The folder's card, or a new one where it has none, that says how to load it from the repository."""
    file = folder / CARD
    written = file.read_text(encoding="utf-8") if file.is_file() else ""
    try:
        text = unsealed(written) if is_ours(written) else card_of(folder)
    except InputError:  # a PEFT adapter of another kind, of which there is nothing to say
        return None
    return sealed(text.replace(HERE, repo)).encode()


# ----------------------------------------------------------------------------------------------------------- the commit


def check_access(repo: str) -> None:
    """
    Raises:
        InputError: no name of a repository, no token, or no network by HF_HUB_OFFLINE.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo}: no name of a repository; pass OWNER/NAME ({error}).") from None
    if constants.is_offline_mode():
        raise InputError(f"{repo}: HF_HUB_OFFLINE is set, and a push needs the Hub; unset it.")
    if get_token() is None:
        raise InputError(f"{repo}: no token for the Hub; run `hf auth login`, or set HF_TOKEN to one that may write.")


def push(upload: Upload, repo: str, *, private: bool = False, revision: str | None = None) -> tuple[str, list[str]]:
    """Makes the repository where it is missing, and commits the files to it.

    Args:
        repo: OWNER/NAME, or a name in the namespace of the token.
        revision: branch, made where it is missing (default: main).

    Returns:
        (address of the commit, what to say of it).

    Raises:
        InputError: `private`, and the repository exists and is public.
        AnswerNo: the Hub refused it or was not reached; it says how to push again.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, said, files = HfApi(library_name="qalora", library_version=__version__), [], dict(upload.files)
    with _failures_named(upload, repo, private, revision):
        repo, new = _made(api, repo, private)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        if not new and upload.own_card and CARD in files and _users_on_the_hub(api, repo, revision):
            del files[CARD]
            said.append(f"{repo}: its {CARD} was written by somebody, and stays")
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=f"Upload {'adapter' if upload.kind == 'adapter' else 'model'} with qalora {__version__}",
            revision=revision,
        )
    return str(commit.commit_url), said


def again(folder: str | Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """The command that pushes a folder."""
    words = ["qalora", "push", str(folder), repo, *(["--private"] if private else [])]
    return shlex.join([*words, *(["--revision", revision] if revision else [])])


def _made(api: HfApi, repo: str, private: bool) -> tuple[str, bool]:
    """(OWNER/NAME, whether the repository is new)."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return api.create_repo(repo, private=private or None, exist_ok=False).repo_id, True
    except HfHubHTTPError as error:
        # There already; or the token may write to it, and not make one.
        if error.response is None or error.response.status_code not in (403, 409):
            raise
    if "/" not in repo:
        repo = f"{api.whoami()['name']}/{repo}"
    if private and not api.repo_info(repo).private:
        raise InputError(f"--private: {repo} exists and is public; make it private on the Hub, or name another.")
    return repo, False


def _users_on_the_hub(api: HfApi, repo: str, revision: str | None) -> bool:
    """Whether the repository has a README.md that is no card of ours."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = f"{api.endpoint}/{repo}/resolve/{quote(revision or 'main', safe='')}/{CARD}"
    response = get_session().get(url, headers=build_hf_headers(library_name="qalora", library_version=__version__))
    if response.status_code == 404:
        return False
    hf_raise_for_status(response)
    return is_users_text(response.text)


@contextmanager
def _failures_named(upload: Upload, repo: str, private: bool, revision: str | None) -> Iterator[None]:
    """
    Raises:
        AnswerNo: in the place of whatever the Hub's client raises.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the Hub's client raises those of the library below it too
        command = again(upload.folder, repo, private=private, revision=revision)
        raise AnswerNo(f"{repo}: not pushed, {_reason(error)}. Push again with: {command}") from error


def _reason(error: BaseException) -> str:
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    known: Mapping[int, str] = {
        401: "for the Hub does not accept the token; run `hf auth login`, or set HF_TOKEN",
        403: "for the token may not write there; take one with the right to write",
        404: "for there is no such repository, or the token does not see it",
    }
    if status in known:
        return known[status]
    cause = error.__cause__ or error
    return f"for the Hub was not reached or refused it ({' '.join(str(cause).split())[:200] or type(cause).__name__})"
