"""Data sets of the library `datasets`, streamed into shards: the real one on files, and a fake."""

import gzip
import importlib.util
import json
import lzma
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from tests.train.data_helpers import open_small
from train.data import __main__ as command
from train.data import hub
from train.data.config import DataConfig
from train.data.hub import DatasetSelection, open_dataset
from train.data.prepare import prepare, prepare_dataset
from train.data.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [f"document {i}: žluťoučký kůň " + "x" * (i % 5) for i in range(20)]

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason='needs datasets: pip install -e ".[data]"'
)


def documents(folder: Path, part: str = "train") -> list[str]:
    meta = json.loads((folder / "meta.json").read_text())
    tokens = np.concatenate([np.fromfile(folder / name, meta["dtype"]) for name in meta[part]])
    ends = np.flatnonzero(tokens == ByteTokenizer.eos_id)
    assert ends[-1] == len(tokens) - 1
    return [ByteTokenizer().decode(part) for part in np.split(tokens, ends[:-1] + 1)]


def json_lines(texts: list[str], field: str = "text") -> str:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts))


def run_main(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["train.data", "prepare", *map(str, arguments)])
    return command.main()


# The library itself, on local files.


@needs_datasets
def test_folder_by_the_command_line_offline(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train-b.jsonl").write_text(json_lines(TEXTS[12:]))
    (tmp_path / "corpus" / "train-a.jsonl").write_text(json_lines(TEXTS[:12]))
    (tmp_path / "corpus" / "test.jsonl").write_text(json_lines(["held out"]))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
    }

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "train.data", "prepare", "--dataset", "corpus", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert "documents," in done.stderr
        return done.stdout

    assert "20 documents" in run("--output", "all", "--shard-tokens", "100")
    assert documents(tmp_path / "all") == TEXTS
    meta = json.loads((tmp_path / "all" / "meta.json").read_text())
    assert len(meta["train"]) > 1
    assert meta["dataset"] == {
        "name": "corpus",
        "config": "default",
        "split": "train",
        "revision": None,
        "text_field": "text",
        "max_documents": None,
        "null_documents": 0,
    }
    # The reader of files, given the same documents, writes the same tokens.
    files = [str(tmp_path / "corpus" / f"train-{part}.jsonl") for part in "ab"]
    same = prepare(files, ByteTokenizer(), tmp_path / "same", shard_tokens=100, quiet=True)
    assert {key: meta[key] for key in same} == same
    for name in meta["train"]:
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    with open_small(DataConfig(source=str(tmp_path / "all"))) as data:
        assert data.train_tokens + data.validation_tokens == meta["tokens"]

    # Ends while the library would go on reading.
    few = ["--max-documents", "2", "--validation-fraction", "0.5"]
    assert "2 documents" in run("--output", "few", *few)
    assert documents(tmp_path / "few") == [TEXTS[0]]
    assert documents(tmp_path / "few", "validation") == [TEXTS[1]]
    run("--output", "other", "--split", "test")
    assert documents(tmp_path / "other") == ["held out"]


@needs_datasets
def test_parquet_json_and_compressed_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": [1, 2, 3], "body": [TEXTS[0], None, TEXTS[1]]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "we[ir]d *.json").write_text(json_lines(TEXTS[:4]))
    (tmp_path / "z1.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS[4:7]).encode()))
    (tmp_path / "z2.jsonl.xz").write_bytes(lzma.compress(json_lines(TEXTS[7:9]).encode()))

    def read(name: str, **fields: object) -> list[str]:
        selection = DatasetSelection(name=str(tmp_path / name), **fields)  # type: ignore[arg-type]
        meta = prepare_dataset(
            selection, ByteTokenizer(), tmp_path / "out", overwrite=True, quiet=True
        )
        assert meta["dataset"]["null_documents"] == (name == "a.parquet")
        return documents(tmp_path / "out")

    assert read("a.parquet", text_field="body") == TEXTS[:2]
    assert read("we[ir]d *.json") == TEXTS[:4]
    assert read("z?.jsonl.*z") == TEXTS[4:9]


@needs_datasets
def test_the_library_fails_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(json_lines(TEXTS, "body"))
    Path("list.jsonl").write_text('{"text": ["a", "b"]}\n')
    Path("bad.jsonl").write_text(json_lines(TEXTS) + "{no json\n")
    Path("bad.parquet").write_bytes(b"PAR1 and no more")
    Path("empty").mkdir()
    for name, fields, message in [
        ("a.jsonl", {}, r"a\.jsonl.*: no field 'text' in \['body', 'id'\]"),
        ("list.jsonl", {}, r"list\.jsonl, row 1: field 'text' is list, not a string"),
        ("bad.jsonl", {}, r"dataset bad\.jsonl"),
        ("bad.parquet", {}, r"dataset bad\.parquet"),
        ("a.jsonl", {"split": "test", "text_field": "body"}, r"a\.jsonl: .*test.*'train'"),
        ("empty", {}, r"dataset empty: .*doesn't contain any data files"),
        # A format's name, for which the library would read the working directory.
        ("json", {}, r"dataset json: neither a local path nor a name on the hub"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            prepare_dataset(DatasetSelection(name=name, **fields), ByteTokenizer(), "out")
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir()) == ["a.jsonl", "bad.jsonl", "bad.parquet", "empty", "list.jsonl"]


# A stand-in, for what needs the hub and where the library is missing.


class FakeRows:
    """Rows with the methods of an IterableDataset that are used."""

    def __init__(self, rows, columns):
        self.rows, self.column_names, self.read, self.closed = rows, columns, 0, False

    def select_columns(self, names):
        self.rows = [{name: row[name] for name in names} for row in self.rows]
        return self

    def __iter__(self):
        try:
            for row in self.rows:
                self.read += 1
                if isinstance(row, Exception):
                    raise row
                yield row
        finally:
            self.closed = True


@pytest.fixture
def fake(monkeypatch):
    """A module `datasets` that serves `fake.rows` as owner/name and notes how it was asked."""
    module = types.ModuleType("datasets")
    module.__version__ = "4.1.0"
    module.rows = FakeRows([{"text": text, "id": 1} for text in TEXTS], ["text", "id"])
    module.asked = []

    class Builder:
        def __init__(self, config):
            self.config = types.SimpleNamespace(name=config or "default")
            self.repo_id, self.hash = "owner/name", "0123abc"
            self.info = types.SimpleNamespace(
                splits={"train": types.SimpleNamespace(num_examples=20)}
            )

        def as_streaming_dataset(self, split):
            module.asked.append(split)
            return module.rows

    def load_dataset_builder(path, name=None, data_files=None, revision=None):
        module.asked.append((path, name, data_files, revision))
        return Builder(name)

    module.load_dataset_builder = load_dataset_builder
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_hub_by_the_command_line(tmp_path, monkeypatch, capsys, fake):
    fake.rows.rows[3] = {"text": None, "id": 1}
    fake.rows.rows[4] = {"text": "half \ud83d a pair", "id": 1}
    arguments = ["--dataset", "owner/name", "--dataset-config", "en", "--dataset-revision", "v1"]
    arguments += ["--max-documents", 7, "--output", tmp_path / "out"]
    assert run_main(monkeypatch, *arguments) == 0
    printed = capsys.readouterr()
    assert "1 rows without 'text' were skipped" in printed.out
    assert "6 documents" in printed.out
    assert "6 documents" in printed.err  # the progress
    assert fake.asked == [("owner/name", "en", None, "v1"), "train"]
    assert documents(tmp_path / "out") == [*TEXTS[:3], "half ? a pair", *TEXTS[5:7]]
    assert (fake.rows.read, fake.rows.closed) == (7, True)  # not one row more
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["dataset"] == {
        "name": "owner/name",
        "config": "en",
        "split": "train",
        "revision": "0123abc",
        "text_field": "text",
        "max_documents": 7,
        "null_documents": 1,
    }


def test_number_of_rows_to_come(fake):
    def total(**fields):
        return open_dataset(DatasetSelection(name="owner/name", **fields)).total

    assert (total(), total(max_documents=5), total(max_documents=50)) == (20, 5, 20)
    assert total(split="test") is None


def test_columns_may_be_unknown(fake):
    fake.rows.column_names = None
    fake.rows.rows[2] = {"body": "other"}
    pieces = open_dataset(DatasetSelection(name="owner/name")).pieces()
    assert [next(pieces), next(pieces)] == [(TEXTS[0], True), (TEXTS[1], True)]
    with pytest.raises(ValueError, match=r"owner/name, row 3: no field 'text' in \['body'\]"):
        next(pieces)


def test_a_broken_connection_leaves_nothing_behind(tmp_path, monkeypatch, capsys, fake):
    # Also an OSError, which must not be taken for an output that cannot be written.
    fake.rows.rows[6] = ConnectionError("gone\n  away")
    fake.rows.column_names = None
    arguments = ["--dataset", "owner/name", "--output", tmp_path / "out"]
    assert run_main(monkeypatch, *arguments) == 2
    assert "error: dataset owner/name, row 7: gone away\n" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_output_is_checked_before_the_network_is_asked(tmp_path, fake):
    with pytest.raises(FileExistsError, match="exists already"):
        prepare_dataset(DatasetSelection(name="owner/name"), ByteTokenizer(), tmp_path)
    with pytest.raises(ValueError, match="shard_tokens=0"):
        prepare_dataset(
            DatasetSelection(name="owner/name"), ByteTokenizer(), tmp_path / "out", shard_tokens=0
        )
    assert fake.asked == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no --input or --dataset"),
        ("--input a.jsonl --dataset owner/name", "--input and --dataset exclude each other"),
        ("--input a.jsonl --max-documents 3", "--max-documents 3 needs --dataset"),
        ("--input a.jsonl --dataset-config en", "--dataset-config en needs --dataset"),
        ("--input a.jsonl --end-of-document x", "--end-of-document x needs --tokenizer"),
        ("--dataset owner/name --jsonl-field x", "--jsonl-field x needs --input"),
        ("--dataset owner/name --max-documents 0", "max_documents=0 must be at least 1"),
        ("--dataset owner/name --text-field=", "text_field must not be empty"),
        ("--dataset=", "dataset: name must not be empty"),
        ("--dataset owner/name --text-field x", "owner/name: no field 'x' in ['id', 'text']"),
        ("--dataset ./nowhere", "'./nowhere' does not exist"),
        ("--dataset nowhere.parquet", "'nowhere.parquet' does not exist"),
        ("--dataset *.parquet", "'*.parquet' matches no file"),
        ("--dataset *", "'*' is files that end in '.jsonl', '.txt'; they must be of one format"),
        ("--dataset a.txt", "'a.txt' is files that end in '.txt'; they must be of one format"),
        ("--dataset a.jsonl --dataset-config en", "is files, so it has no config 'en'"),
        ("--dataset . --dataset-revision v1", "is local, so it has no revision 'v1'"),
    ],
)
def test_wrong_arguments_in_one_line(tmp_path, monkeypatch, capsys, fake, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(json_lines(TEXTS))
    Path("a.txt").write_text("text")
    assert run_main(monkeypatch, "--output", "out", *arguments.split()) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert message in printed
    assert sorted(os.listdir()) == ["a.jsonl", "a.txt"]


def test_missing_and_old_library(tmp_path, monkeypatch, fake):
    selection = DatasetSelection(name="owner/name")
    fake.__version__ = "3.6.0"
    with pytest.raises(ValueError, match=r"datasets 4 or newer, not 3\.6\.0: pip install"):
        open_dataset(selection)
    del fake.__version__  # a mere folder called datasets
    with pytest.raises(ValueError, match=r'needs datasets: pip install -e "\.\[data\]"'):
        open_dataset(selection)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'needs datasets: pip install -e "\.\[data\]"'):
        prepare_dataset(selection, ByteTokenizer(), tmp_path / "out")
    assert os.listdir(tmp_path) == []
    assert hub._LEAST_VERSION == 4  # the same as in pyproject.toml
    assert '"datasets>=4"' in (ROOT / "pyproject.toml").read_text()
