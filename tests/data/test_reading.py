"""Sources of every form → the same rows and tokens; which splits they have; and one sentence where they have none."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import datasets
import pyarrow
import pytest

from qalora.base.loading import load_tokenizer
from qalora.base.registry import resolve
from qalora.data.reading import QUICKSTART, paths_of, read_rows
from qalora.data.tokenization import load_dataset
from qalora.errors import InputError

datasets.disable_progress_bars()

ROWS = [{"prompt": f"ä{i}: ", "completion": f'é{i}\u2028,\n"q"'} for i in range(10)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def refused(message: str, call, *arguments, **settings) -> None:
    """The call fails with exactly this sentence."""
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        call(*arguments, **settings)


def write(path: Path, rows: list[dict] = ROWS) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------------------- every form


def of_bytes(folder: Path) -> str:
    from pyarrow import parquet

    table = pyarrow.table({name: [row[name].encode() for row in ROWS] for name in ROWS[0]})
    parquet.write_table(table, folder / "r.parquet")
    return "r.parquet"


def in_parts(folder: Path) -> None:
    for i in range(5):
        write(folder / f"part-{i}.jsonl", ROWS[2 * i : 2 * i + 2])


def pattern(folder: Path) -> str:
    in_parts(folder)
    return "part-*.jsonl"


def deep_pattern(folder: Path) -> str:
    write(folder / "a" / "1.jsonl", ROWS[:5])
    write(folder / "a" / "b" / "2.jsonl", ROWS[5:])
    return "**/*.jsonl"


def several(folder: Path) -> list[str]:
    in_parts(folder)
    reference().to_parquet(str(folder / "last.parquet"))
    return ["part-[0-3].jsonl", "part-4.jsonl"]


def commas(folder: Path) -> str:
    write(folder / "a.jsonl", ROWS[:5])
    (folder / "b.csv.gz").write_bytes(
        gzip.compress(reference().select(range(5, 10)).to_pandas().to_csv(index=False).encode())
    )
    return "a.jsonl, b.csv.gz"


def a_comma_in_its_name(folder: Path) -> str:
    write(folder / "a,b.jsonl")
    return "a,b.jsonl"


def plain_folder(folder: Path) -> str:
    in_parts(folder / "rows")
    (folder / "rows" / "README.md").write_text("# Rows\n")
    (folder / "rows" / ".hidden.jsonl").write_text("no JSON")
    return "rows"


def folder_with_splits(folder: Path) -> str:
    write(folder / "rows" / "train.jsonl")
    write(folder / "rows" / "test.jsonl", ROWS[:1])
    return "rows"


def folder_of_the_hub(folder: Path) -> str:
    (folder / "rows" / "data").mkdir(parents=True)
    reference().to_parquet(str(folder / "rows" / "data" / "train-00000-of-00001.parquet"))
    reference().select([0]).to_parquet(str(folder / "rows" / "data" / "test-00000-of-00001.parquet"))
    return "rows"


def saved(folder: Path) -> str:
    reference().save_to_disk(str(folder / "saved"))
    return "saved"


def saved_in_shards(folder: Path) -> str:
    reference().select(range(9, -1, -1)).select(range(9, -1, -1)).save_to_disk(str(folder / "saved"), num_shards=3)
    return "saved"


def saved_splits(folder: Path) -> str:
    datasets.DatasetDict(test=reference().select([0]), train=reference()).save_to_disk(str(folder / "saved"))
    return "saved"


def saved_arrow(folder: Path) -> str:
    reference().save_to_disk(str(folder / "saved"))
    return "saved/data-00000-of-00001.arrow"


def writer(name: str, method: str, **settings):
    def form(folder: Path) -> str:
        getattr(reference(), method)(str(folder / name), **settings)
        return name

    form.__name__ = name
    return form


def compressed(folder: Path) -> str:
    (folder / "R.JSONL.BZ2").write_bytes(bz2.compress(LINES.encode()))
    return "R.JSONL.BZ2"


def zipped(folder: Path) -> str:
    with zipfile.ZipFile(folder / "R.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows/b.jsonl.gz", gzip.compress(LINES.partition("\n")[2].encode()))
        archive.writestr("rows/a.jsonl", LINES.partition("\n")[0])
        archive.writestr("rows/README.txt", "what this is")
        archive.writestr("__MACOSX/rows/._a.jsonl", b"\0\5\26\7")
    return "R.zip"


def beside_a_note(folder: Path) -> str:
    write(folder / "rows" / "r.jsonl")
    (folder / "rows" / "LICENSE.txt").write_text("free")
    return "rows"


def reference() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS)


FORMS = [
    of_bytes, pattern, deep_pattern, several, commas, a_comma_in_its_name, plain_folder, folder_with_splits,
    folder_of_the_hub, saved, saved_in_shards, saved_splits, saved_arrow, compressed, zipped, beside_a_note,
    writer("r.jsonl", "to_json"), writer("r.json", "to_json", lines=False), writer("r.csv", "to_csv"),
    writer("r.tsv", "to_csv", sep="\t"), writer("r.parquet", "to_parquet"), writer("r.jsonl.gz", "to_json",
    compression="gzip"), writer("list.json", "to_json", lines=False, orient="records"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(save_tiny_llama, tmp_path_factory):
    return load_tokenizer(resolve(str(save_tiny_llama(tmp_path_factory.mktemp("tiny") / "model"))))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_of_the_rows_gives_the_same_tokens(form, tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = form(tmp_path)
    assert read_rows(named) == ROWS
    assert read_rows(named, limit=4) == ROWS[:4]
    items = load_dataset(named, tokenizer, max_seq_len=64).items
    assert [item["row"] for item in items] == list(range(10))
    for item, row in zip(items, ROWS, strict=True):
        prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        completion += [tokenizer.eos_token_id]
        assert item["input_ids"] == prompt + completion
        assert item["labels"] == [-100] * len(prompt) + completion


def test_values_of_mixed_types_that_datasets_keeps_as_json(tmp_path):
    rows = [{"m": [{"a": 1}, {"a": {"b": "x"}}], "j": [1, "x"]}]
    mixed = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    mixed.save_to_disk(str(tmp_path / "saved"))
    mixed.to_parquet(str(tmp_path / "r.parquet"))
    for name in ("saved", "r.parquet", "saved/data-00000-of-00001.arrow"):
        assert read_rows(str(tmp_path / name)) == datasets.load_from_disk(str(tmp_path / "saved")).to_list() == rows


# --------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    "split",
    [
        "train", "train[:3]", "train[2:5]", "train[-2:]", "train[:25%]", "train[50%:]", "train[25%:75%]",
        "train[:1000]", "train[:10%]+train[-10%:]",
    ],
)  # fmt: skip
def test_a_slice_is_what_datasets_takes(tmp_path_factory, split):
    folder = tmp_path_factory.getbasetemp() / "slices"
    path = write(folder / "r.jsonl")
    expected = datasets.load_dataset("json", data_files=path, split=split, cache_dir=str(folder / "cache"))
    assert read_rows(path, split=split) == expected.to_list()


def test_a_slice_without_rows_is_refused(tmp_path):
    path = write(tmp_path / "r.jsonl")
    refused(f"{path}: no rows in it (split train[5:5]).", read_rows, path, split="train[5:5]")


def test_the_splits_of_a_folder_and_of_a_saved_set(tmp_path):
    for name, row in (("train", 0), ("test", 1)):
        write(tmp_path / "folder" / f"{name}.jsonl", ROWS[row : row + 1])
    reference().select([0]).save_to_disk(str(tmp_path / "saved" / "train"))
    datasets.DatasetDict(train=reference().select([0]), test=reference().select([1])).save_to_disk(
        str(tmp_path / "saved")
    )
    for folder in (str(tmp_path / "folder"), str(tmp_path / "saved")):
        assert read_rows(folder, split="test") == ROWS[1:2]
        assert read_rows(folder, split="test+train") == [ROWS[1], ROWS[0]]
        refused(f"{folder}: no split 'validation'; it has train, test.", read_rows, folder, split="validation")
        refused(f"{folder}: no split 'tset'; it has train, test.", read_rows, folder, split="train+tset[:1]")


def test_one_set_of_rows_is_every_split_but_not_two(tmp_path):
    path = write(tmp_path / "r.jsonl")
    assert read_rows(path, split="validation") == ROWS
    assert read_rows(path, split="validation[:50%]") == ROWS[:5]
    with pytest.raises(InputError, match=r"has no splits, and split 'train\+test' asks for several"):
        read_rows(path, split="train+test")
    with pytest.raises(InputError, match=r"split 'train\[a:\]' cannot be taken"):
        read_rows(path, split="train[a:]")


def test_the_quickstart_rows_are_built_in():
    assert [len(read_rows(QUICKSTART, split=split, limit=5)) for split in ("train", "validation")] == [5, 5]
    assert set(read_rows(QUICKSTART, limit=1)[0]) == {"prompt", "completion"}


def test_a_split_that_the_quickstart_task_lacks_is_named():
    refused(f"{QUICKSTART}: no split 'test'; it has train, validation.", read_rows, QUICKSTART, split="test")


# --------------------------------------------------------------------------------------------- configurations, the Hub


CARD = """---
license: mit
configs:
- config_name: one
  data_files: [{split: train, path: one.jsonl}]
- config_name: two
  data_files: [{split: train, path: two.jsonl}]
---
# Rows
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "clone" / "one.jsonl", ROWS[:1])
    write(tmp_path / "clone" / "two.jsonl", ROWS[1:])
    (tmp_path / "clone" / "README.md").write_text(CARD)
    return str(tmp_path / "clone")


def test_a_configuration_of_a_clone(clone):
    assert read_rows(clone, name="two") == ROWS[1:]
    assert read_rows(clone, name="two", split="train[:2]", limit=1) == ROWS[1:2]
    with pytest.raises(InputError, match=r"split train; set data.name to one of its configurations.*'one', 'two'"):
        read_rows(clone)
    with pytest.raises(InputError, match="three"):
        read_rows(clone, name="three")


@pytest.mark.parametrize(("name", "asked"), [(None, [None, "main"]), ("socratic", ["socratic"])])
def test_a_data_set_of_the_hub(monkeypatch, name, asked):
    seen = []

    def hub(source, name, *, split):
        seen.append(name)
        if name is None:
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']"
            )
        assert (source, split) == ("openai/gsm8k", "test[:5]")
        return reference().select(range(5))

    monkeypatch.setattr("datasets.load_dataset", hub)
    rows = read_rows("openai/gsm8k", split="test[:5]", name=name, limit=3)
    assert (rows, seen) == (ROWS[:3], asked)
    assert rows.places[2] == "openai/gsm8k (test[:5]), row 2"


def test_what_is_neither_a_file_nor_on_the_hub_is_named():
    with pytest.raises(
        InputError, match=r"^data nobody/nothing: neither a file nor a data set of the Hub .*split test"
    ):
        read_rows("nobody/nothing", split="test")


# ------------------------------------------------------------------------------------------------------ bad sources


def test_what_is_not_there_is_named(tmp_path):
    refused("nowhere.jsonl: no such file.", read_rows, "nowhere.jsonl")
    refused("nowhere.CSV.GZ: no such file.", read_rows, "nowhere.CSV.GZ")
    refused(f"{tmp_path}/nothing: no such file.", read_rows, f"{tmp_path}/nothing")
    refused(f"{tmp_path}/*.jsonl: no file matches.", read_rows, f"{tmp_path}/*.jsonl")
    (tmp_path / "README.md").touch()
    refused(
        f"{tmp_path}: a folder without a file of rows (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .txt).",
        read_rows,
        str(tmp_path),
    )
    path = write(tmp_path / "r.jsonl")
    refused("nowhere.jsonl: no such file.", read_rows, [path, "nowhere.jsonl"])
    (tmp_path / "empty.jsonl").touch()
    refused(f"{tmp_path}/empty.jsonl: no rows in it.", read_rows, f"{path},{tmp_path}/empty.jsonl")


def test_the_same_rows_in_two_forms_are_not_read_twice(tmp_path):
    path = write(tmp_path / "r.jsonl")
    reference().to_csv(str(tmp_path / "r.csv"))
    with pytest.raises(InputError, match=r"holds \.csv and \.jsonl files.*such as \*\.csv") as error:
        read_rows(str(tmp_path))
    advised = re.search(r"such as (\S+)\.$", str(error.value))[1]
    assert read_rows(f"{tmp_path}/{advised}") == ROWS
    os.remove(tmp_path / "r.csv")
    Path(f"{path}.gz").write_bytes(gzip.compress(LINES.encode()))
    with pytest.raises(InputError, match=r"r\.jsonl and r\.jsonl\.gz are the same file twice"):
        read_rows(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.md": "x"}, ": a zip without a file of rows (.jsonl,"),
        ({"a.jsonl": LINES, "a.csv": "a\n1\n"}, ": holds .csv and .jsonl files, which may be the same rows twice"),
        ({"in/a.jsonl": '{"a": 1}\n{"a"'}, "/in/a.jsonl, line 2: not valid JSON"),
        ({}, ": a zip without a file of rows"),
    ],
)
def test_a_zip_that_cannot_be_read_is_named(tmp_path, files, message):
    path = tmp_path / "r.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    with pytest.raises(InputError, match=f"^{re.escape(str(path) + message)}"):
        read_rows(str(path))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(
        InputError, match=r"r\.zip: a zip that cannot be read \(File is not a zip file\); is it whole\?"
    ):
        read_rows(str(path))


def test_sources_of_several_formats_are_each_read_by_their_own(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": chat}], [{"instruction": "i", "input": "", "output": "o"}] * 2, ROWS[:1]
    files = [write(tmp_path / f"{i}.jsonl", list(part)) for i, part in enumerate(rows)]
    alone = [load_dataset(file, tokenizer).items for file in files]
    together = load_dataset(files, tokenizer).items
    tokens = ("input_ids", "labels")
    assert [[item[key] for key in tokens] for item in together] == [
        [item[key] for key in tokens] for items in alone for item in items
    ]
    assert [item["row"] for item in together] == [0, 1, 2, 3]


def test_a_saved_set_that_is_damaged_is_named(tmp_path):
    folder = tmp_path / saved(tmp_path)
    (folder / "data-00000-of-00001.arrow").write_bytes(b"x")
    with pytest.raises(InputError, match=rf"^{re.escape(str(folder))}: a data set that cannot be read"):
        read_rows(str(folder))


def test_a_bad_row_of_several_files_is_named_by_its_own(tmp_path, tokenizer):
    named = [write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", [ROWS[0], {"prompt": "a"}])]
    with pytest.raises(InputError, match=rf"^{re.escape(named[1])}, line 2: no column 'completion'"):
        load_dataset(named, tokenizer)


def test_the_paths_that_a_source_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    in_parts(tmp_path)
    names = [f"part-{i}.jsonl" for i in range(5)]
    assert paths_of("part-*.jsonl") == [Path(name) for name in names]
    assert paths_of("part-0.jsonl,part-1.jsonl") == [Path(name) for name in names[:2]]
    assert paths_of(["~/part-0.jsonl", "owner/name"]) == [tmp_path / "part-0.jsonl", Path("owner/name")]
    assert paths_of(None) == []
    shutil.move("part-0.jsonl", "part-[0-4].jsonl")  # a name that looks like a pattern
    assert paths_of("part-[0-4].jsonl") == [Path("part-[0-4].jsonl")]
    assert read_rows("part-[0-4].jsonl") == ROWS[:2]
