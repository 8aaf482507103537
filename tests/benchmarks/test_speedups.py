"""The speeds that studies read, drawn from results of the step benchmark."""

import json
from pathlib import Path

import pytest

from benchmarks.speedups import main
from train.study.equal_time import read_speedups

COMMITTED = Path(__file__).parents[2] / "benchmarks/results/studies/speedups.json"


def row(phase, speedup):
    return {"phase": phase, "speedup": speedup}


@pytest.fixture
def folder(tmp_path):
    groups = [{"rows": [row("dense", 1.0), row("sparse", s)]} for s in (1.5, 1.25)]
    groups.append({"rows": [row("dense", 1.0)]})
    (tmp_path / "step.json").write_text(json.dumps({"groups": groups}))
    (tmp_path / "notes.txt").write_text("as measured")
    (tmp_path / "step.png").write_bytes(b"\x89PNG")
    return tmp_path


def write(folder, sources):
    file = folder / "speedups.json"
    content = {"benchmark": "train_step", "sources": sources, "sparse_step_speedup": {"M16": 9.0}}
    file.write_text(json.dumps(content))
    return file


def test_committed_speeds_are_what_their_sources_say(capsys):
    assert main(["--check", str(COMMITTED)]) == 0
    assert "is what its sources say" in capsys.readouterr().out


def test_numbers_follow_their_sources(folder, capsys):
    file = write(folder, {"M16": "step.json#1", "M32": "step.json#0", "M8": None})
    assert main(["--check", str(file)]) == 1
    assert json.loads(file.read_text())["sparse_step_speedup"] == {"M16": 9.0}
    assert main([str(file)]) == 0
    assert main(["--check", str(file)]) == 0
    speeds = read_speedups(file)
    assert [speeds.of(label) for label in ("M16 50%", "M32", "M8", "M64")] == [
        1.25,
        1.5,
        None,
        None,
    ]
    assert "not what" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"M16": "step.json"}, "'step.json' must end in # and a group's number"),
        ({"M16": "step.json#3"}, "'M16': step.json: there is no group 3, only 3"),
        ({"M16": "step.json#2"}, "group 2 has 0 sparse steps"),
        ({"M16": "other.json#0"}, "No such file"),
        ({"M16": "notes.txt#0"}, "notes.txt is not JSON"),
        ({"M16": "step.png#0"}, "step.png is not JSON"),
        (None, "says nothing under 'sources'"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_line(folder, sources, message, capsys):
    file = write(folder, sources)
    before = file.read_text()
    assert main([str(file)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert message in line
    assert file.read_text() == before
