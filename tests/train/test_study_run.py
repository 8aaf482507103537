"""Studies that run: the smoke study end to end, and what the runner does when things go wrong."""

import dataclasses
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.train.data_helpers import write_shard
from tests.train.study_processes import die, fake, fill_the_disk, pretend, wait
from train.runtime import reserve_memory
from train.study import definition, runner
from train.study.__main__ import main
from train.study.definition import Options
from train.study.equal_time import Speedups
from train.study.execute import execute
from train.study.export import export, reuse, unpack
from train.study.pool import Pool
from train.study.record import FORMAT, Folders, read, write
from train.study.runner import expected_seconds, plan, run_study, select

SILENT = Console(quiet=True)
BINARY = str(Path(__file__).parents[2] / "docs" / "images" / "vnm.png")


@pytest.fixture(name="done", scope="module")
def _done(tmp_path_factory):
    """The smoke study without SwiGLU, run once."""
    output = tmp_path_factory.mktemp("smoke")
    argv = ["smoke", "--only", "relu2", "sparse", "--output", str(output), "--speedup", "1.3"]
    assert main(argv) == 0
    return output


def results(output):
    return {p.stem: json.loads(p.read_text()) for p in (output / "results").glob("*.json")}


def test_a_file_a_run_with_everything_in_it(done):
    found = results(done)
    assert sorted(found) == ["relu2-seed0", "sparse-seed0"]
    for record in found.values():
        assert record["status"] == "finished"
        assert record["tokens"] == 24 * 4 * 64
        assert record["curve"]["step"] == sorted({*range(3, 25, 3), 12})
        assert record["evaluations"]["step"] == [12, 24]
        assert record["final"]["loss_dense"] == record["evaluations"]["loss_dense"][-1]
        assert record["best"]["loss_dense"]["loss"] == min(record["evaluations"]["loss_dense"])
        assert record["data"]["evaluated_tokens"] == 16 * 64
        assert record["jobs"] == 1
        # 16 windows in batches of 4.
        assert len(record["final_batches"]) == 4
        assert sum(record["final_batches"]) / 4 == pytest.approx(record["final"]["loss_dense"])
        assert record["phases"]["dense"]["tokens_per_second"] > 0
        assert record["wall_seconds"] > record["loop_seconds"] > 0
        assert {"python", "jax", "flax"} <= record["versions"].keys()
        assert record["device"]["platform"]
    sparse = found["sparse-seed0"]
    assert {"dense", "sparse"} == sparse["phases"].keys() == set(sparse["curve"]["phase"])
    assert sparse["final"].keys() == {"loss_dense", "loss_sparse"}
    assert sparse["expert_load"] >= 1
    assert found["relu2-seed0"]["expert_load"] is None
    # D 32, H 128, 2 layers: attention, FFN and norms.
    assert (
        found["relu2-seed0"]["model"]["body_parameters"] == 2 * (4 * 32**2 + 2 * 32 * 128 + 64) + 32
    )


def test_on_a_folder_of_shards_with_its_own_held_out_text(tmp_path):
    """As the studies on real text: compressed shards, of which one is held out."""
    rng = np.random.default_rng(0)
    (tmp_path / "text").mkdir()
    for name, size in (("train-00", 9000), ("train-01", 9000), ("val", 16 * 65)):
        write_shard(tmp_path / "text" / f"{name}.bin.xz", rng.integers(0, 256, size))
    output = tmp_path / "out"
    argv = ["smoke", "--only", "relu2", "--output", str(output)]
    argv += ["--data.source", str(tmp_path / "text" / "train-*.bin.xz")]
    argv += ["--data.validation", str(tmp_path / "text" / "val.bin.xz")]
    assert main([*argv, "--data.cache", str(tmp_path / "cache")]) == 0
    record = results(output)["relu2-seed0"]
    assert record["status"] == "finished"
    assert record["data"]["evaluated_tokens"] == 16 * 64
    # Nothing can be learned of noise but how many symbols there are.
    assert record["final"]["loss_dense"] == pytest.approx(np.log(256), abs=0.5)


def test_the_report_stands_beside_the_results(done):
    assert {p.name for p in done.iterdir()} >= {
        "report.md",
        "study.json",
        "curves.png",
        "final_loss.png",
        "pareto.png",
    }
    assert not list(done.rglob("checkpoints"))


def test_what_is_done_is_not_done_again(done, capsys):
    before = {p: p.stat().st_mtime_ns for p in (done / "results").iterdir()}
    argv = ["smoke", "--output", str(done), "--only", "relu2", "sparse"]
    assert main(argv) == 0
    assert {p: p.stat().st_mtime_ns for p in (done / "results").iterdir()} == before
    assert "0 runs to do, 2 done before" in capsys.readouterr().out
    assert main(["smoke", "--output", str(done), "--list"]) == 0
    assert "3 runs" in (out := capsys.readouterr().out)
    assert out.count("1 done") == 2
    assert main(["smoke", "--output", str(done), "--report"]) == 0


def test_another_configuration_is_refused_until_replaced(done, capsys):
    argv = ["smoke", "--output", str(done), "--only", "relu2", "--data.validation-fraction", "0.1"]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "data.validation_fraction: 0.05, now 0.1" in error
    assert error.count("\n") == 1
    assert main([*argv, "--list"]) == 0
    assert "of another configuration" in capsys.readouterr().out
    study = definition.get("smoke", Options())
    changed = dataclasses.replace(study.runs[0], seed=0)
    config = dataclasses.replace(changed.config, steps=25)
    changed = dataclasses.replace(changed, config=config)
    folders = Folders(done, done / "scratch")
    assert plan(study, [changed], folders, replace=True).left == [changed]


def test_a_run_in_its_own_process(done, tmp_path):
    """Isolated runs give the same losses; programs come from the shared cache."""
    study = definition.get("smoke", Options())
    run = study.runs[0]
    folders = Folders(tmp_path, done / "scratch")
    outcome = plan(study, [run], folders)
    run_study(study, outcome, folders, console=SILENT, isolate=True)
    assert outcome.failed == []
    (record,) = outcome.done
    assert record["final"] == pytest.approx(results(done)["relu2-seed0"]["final"], abs=1e-4)


def isolated(folder, monkeypatch, execute):
    """The first run of the smoke study in a process of its own that does this instead."""
    monkeypatch.setattr(runner, "execute", execute)
    study, folders = definition.get("smoke", Options()), Folders(folder, folder)
    outcome = plan(study, study.runs[:1], folders)
    run_study(study, outcome, folders, console=SILENT, isolate=True)
    return study, folders, outcome


def test_a_process_that_dies_is_a_failed_run(tmp_path, monkeypatch):
    study, folders, outcome = isolated(tmp_path, monkeypatch, die)
    assert [r["error"] for r in outcome.failed] == ["its process died: SIGKILL"]
    assert plan(study, study.runs[:1], folders).left == [study.runs[0]]


def test_a_result_that_a_process_cannot_write_is_a_failure(tmp_path, monkeypatch):
    _, _, outcome = isolated(tmp_path, monkeypatch, fill_the_disk)
    assert outcome.stopped is None
    assert [r["error"] for r in outcome.failed] == ["its process died: exit code 1"]


def test_a_run_that_diverges_is_a_result(done, tmp_path):
    study = definition.get("smoke", Options())
    config = study.runs[0].config
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e30, warmup_steps=0)
    config = dataclasses.replace(config, optimizer=optimizer)
    run = dataclasses.replace(study.runs[0], config=config)
    folders = Folders(tmp_path, done / "scratch")
    record = execute(run, "smoke", folders)
    assert record["status"] == "non_finite"
    assert "of 24" in record["error"]
    assert record["final"] == {}
    assert read(folders.result(run)) == record
    assert plan(study, [run], folders).done == [record]


def test_a_run_that_fails_is_reported_and_tried_again(tmp_path):
    study = definition.get("smoke", Options())
    data = dataclasses.replace(study.runs[0].config.data, source="/nowhere/x.bin")
    config = dataclasses.replace(study.runs[0].config, data=data)
    run = dataclasses.replace(study.runs[0], config=config)
    folders = Folders(tmp_path, tmp_path / "scratch")
    record = execute(run, "smoke", folders)
    assert record["status"] == "failed"
    assert record["error"].startswith("FileNotFoundError: data.source='/nowhere/x.bin'")
    assert "Traceback" in folders.log(run).read_text()
    assert plan(study, [run], folders).left == [run]


@pytest.fixture(name="acted")
def _acted(monkeypatch, tmp_path):
    """The runner with runs that only pretend; returns what was run and how runs end."""
    study = definition.get("smoke", Options(seeds=(0, 1)))
    folders = Folders(tmp_path, tmp_path)
    ran, ends = [], {}

    def act(run, name, folders, line=None, jobs=1):
        ran.append(run.key)
        end = ends.get(run.key, "finished")
        if isinstance(end, BaseException):
            raise end
        if end is None:
            return None
        record = fake(run, name, end)
        write(folders.result(run), record)
        return record

    monkeypatch.setattr(runner, "execute", act)

    def go(**options):
        outcome = plan(study, study.runs, folders)
        run_study(study, outcome, folders, console=SILENT, **options)
        return outcome

    return ran, ends, go


def test_one_failure_does_not_stop_the_others(acted):
    ran, ends, go = acted
    ends["sparse-seed0"] = "failed"
    outcome = go()
    assert len(ran) == 6
    assert [r["label"] for r in outcome.failed] == ["sparse"]
    assert (len(outcome.done), outcome.left, outcome.stopped) == (5, [], None)
    ends.clear()
    assert len(go().done) == 6
    assert ran[6:] == ["sparse-seed0"]


@pytest.mark.parametrize("end", [None, KeyboardInterrupt()])
def test_an_interrupted_run_starts_over(acted, end):
    ran, ends, go = acted
    ends["sparse-seed0"] = end
    outcome = go()
    assert ran == ["relu2-seed0", "sparse-seed0"]
    assert "interrupted" in outcome.stopped
    assert outcome.interrupted
    assert len(outcome.left) == 5
    ends.clear()
    assert len(go().done) == 6
    assert ran[2] == "sparse-seed0"


def test_time_is_up_between_runs(acted, monkeypatch):
    ran, _, go = acted
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr(runner.time, "monotonic", lambda: float(next(clock)))
    # A run is thought to take 1 s; the clock says 50 s at each look at it.
    outcome = go(budget_seconds=120.0)
    assert ran == ["relu2-seed0", "sparse-seed0"]
    assert "--budget-seconds 120" in outcome.stopped
    assert not outcome.interrupted
    go(budget_seconds=1e-6)
    assert len(ran) == 3  # the first one always runs, or nothing ever would


def test_a_dead_device_stops_the_study(acted, monkeypatch):
    ran, ends, go = acted
    ends["relu2-seed0"] = "failed"
    monkeypatch.setattr(runner, "device_answers", lambda: False)
    assert "no longer answers" in go().stopped
    assert len(ran) == 1


def test_expected_time():
    study = definition.get("smoke", Options())
    relu2, sparse, _ = study.runs
    assert expected_seconds(relu2, []) is None
    records = [fake(relu2, "x", seconds=4.0), fake(sparse, "x", "non_finite", 1.0)]
    assert expected_seconds(relu2, records) == 4.0
    longer = dataclasses.replace(sparse.config, steps=2 * sparse.config.steps)
    assert expected_seconds(dataclasses.replace(sparse, config=longer), records) == 8.0
    records.append(fake(sparse, "x", seconds=6.0))
    assert expected_seconds(sparse, records) == 6.0


def test_only_takes_labels_and_patterns():
    study = definition.get("dense_sweep", Options())
    assert {run.factors["ffn"] for run in select(study, ["swiglu*"])} == {"swiglu"}
    assert len(select(study, [])) == len(study.runs)
    smoke = definition.get("smoke", Options())
    assert [run.label for run in select(smoke, ["sparse", "relu2"])] == ["relu2", "sparse"]
    with pytest.raises(ValueError, match=r"--only 'x\*' matches no label.*relu2, sparse, swiglu"):
        select(smoke, ["x*"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "which study? known: block_size"),
        (["nope"], "study 'nope' is unknown; known: block_size"),
        (["smoke", "--base", "nope"], "config 'nope' is unknown"),
        (["smoke", "--only", "x"], "--only 'x' matches no label"),
        (["smoke", "--budget-seconds", "0"], "--budget-seconds 0 must be positive"),
        (["smoke", "--jobs", "0"], "--jobs 0 must be at least 1"),
        (["smoke", "--speedup", "-1"], "speedup=-1.0 must be a positive number"),
        (["smoke", "--speedup", "1", "--speedup-from", "x"], "not both"),
        (["smoke", "--speedup-from", "/nowhere.json"], "/nowhere.json"),
        (["smoke", "--tuned", BINARY], f"{BINARY} is no file of"),
        (["smoke", "--also", BINARY], f"{BINARY} is not JSON"),
        (["smoke", "--speedup-from", BINARY], f"{BINARY} is not JSON"),
        (["smoke", "--baseline", "relu3"], "relu3"),
        (["equal_time"], "give --speedup S"),
        (["smoke", "--report"], "holds no results"),
    ],
)
def test_refused_in_one_line(capsys, tmp_path, argv, message):
    assert main([*argv, "--output", str(tmp_path / "out")]) == 2
    out, error = capsys.readouterr()
    assert message in error
    assert error.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("width", ["80", None], ids=["a terminal", "a file"])
def test_no_number_of_a_listed_run_is_cut_off(capsys, monkeypatch, tmp_path, width):
    if width is not None:
        monkeypatch.setenv("COLUMNS", width)
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    argv = ["verdict", "--speedup", "1.4", "--output", str(tmp_path / "out"), "--list"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    assert re.search(r"^\d+ runs, [\d,]+ M tokens$", out, re.MULTILINE)
    # A file has room for every label in a line of its own.
    study = definition.get("verdict", Options(speedups=Speedups(1.4)))
    assert width is not None or all(f"│ {label} " in out for label in study.labels)


def test_the_studies_are_listed(capsys):
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and definition.summary(name)[:40] in out for name in definition.names())


def test_a_signal_ends_the_run_in_the_other_process_too(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "execute", wait)
    study = definition.get("smoke", Options())
    folders = Folders(tmp_path, tmp_path)
    outcome = plan(study, study.runs, folders)

    def interrupt():
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    run_study(study, outcome, folders, console=SILENT, isolate=True)
    thread.join()
    assert "interrupted" in outcome.stopped
    assert outcome.interrupted
    assert outcome.failed == []
    assert len(outcome.left) == 3


def test_the_exit_code_says_that_a_study_was_interrupted(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "execute", interrupted)
    assert main(["smoke", "--output", str(tmp_path)]) == 130


def test_runs_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "execute", pretend)
    study = definition.get("smoke", Options(seeds=(0, 1)))
    runs = [run for label in study.labels for run in study.runs if run.label == label]
    folders = Folders(tmp_path, tmp_path)
    outcome, ended = plan(study, runs, folders), []
    run_study(study, outcome, folders, console=SILENT, jobs=2, ended=lambda: ended.append(1))
    assert (outcome.left, outcome.stopped) == ([], None)
    assert sorted(r["label"] for r in outcome.done) == ["relu2", "relu2", "sparse", "sparse"]
    assert {r["jobs"] for r in outcome.done} == {2}
    # Two processes, each of which served two runs; a process that dies is replaced.
    assert len({r["process"] for r in outcome.done}) == 2
    assert [r["error"] for r in outcome.failed] == ["its process died: SIGKILL"] * 2
    assert len(ended) == 6


def test_a_process_that_dies_idle_takes_no_run_with_it(tmp_path):
    study = definition.get("smoke", Options())
    with Pool(pretend, "smoke", Folders(tmp_path, tmp_path), jobs=1) as pool:
        for run in study.runs[:2]:
            (tmp_path / f"{run.label}-seed1").touch()
            pool.start(run)
            (ended,) = pool.wait(60.0)
            assert ended.record is not None
            assert ended.record["status"] == "finished"
            os.kill(ended.record["process"], signal.SIGKILL)
            pool._idle[0].process.join()


def test_one_file_is_enough_to_report_and_to_go_on(done, tmp_path, capsys):
    file = tmp_path / "export" / "study_smoke.json"
    only = ["--only", "relu2", "sparse"]
    assert main(["smoke", "--output", str(done), *only, "--export", str(file)]) == 0
    assert len(file.read_text().splitlines()) == 3 + 2 + 1  # a line a run
    capsys.readouterr()
    # Elsewhere, from the file alone.
    elsewhere = tmp_path / "elsewhere"
    argv = ["smoke", "--output", str(elsewhere), "--export", str(file)]
    assert main([*argv, "--report"]) == 0
    assert (elsewhere / "report.md").read_text() == (done / "report.md").read_text()
    assert (elsewhere / "curves.png").exists()
    assert main([*argv, *only]) == 0
    assert "0 runs to do, 2 done before" in capsys.readouterr().out
    for name, record in results(elsewhere).items():
        assert record["final"] == results(done)[name]["final"]
        exact, rounded = results(done)[name]["curve"], record["curve"]
        assert rounded["loss"] == pytest.approx(exact["loss"], rel=1e-5)
        assert rounded["phase"] == exact["phase"]
    # Two machines' shares of the runs, joined in one file.
    whole = json.loads(file.read_text())
    shares = []
    for i, run in enumerate(whole["runs"]):
        write(tmp_path / f"share{i}.json", whole | {"runs": [run]})
        shares.append(str(tmp_path / f"share{i}.json"))
    joined = tmp_path / "joined.json"
    argv = ["smoke", "--report", "--output", str(tmp_path / "join"), "--export", str(joined)]
    assert main([*argv, "--also", *shares]) == 0
    assert json.loads(joined.read_text()) == whole
    assert main([*argv, "--also", "nowhere.json"]) == 2
    assert capsys.readouterr().err == "error: --also nowhere.json: no such file\n"
    # What is there already stays, and another study's file is refused.
    assert unpack(file, done) == 0
    header = json.loads((done / "study.json").read_text())
    write(tmp_path / "other" / "study.json", header | {"name": "other"})
    with pytest.raises(ValueError, match="is of study 'smoke'"):
        unpack(file, tmp_path / "other")
    write(tmp_path / "none.json", {"format": FORMAT})
    with pytest.raises(ValueError, match="is no exported study"):
        unpack(tmp_path / "none.json", tmp_path / "new")
    assert unpack(tmp_path / "missing.json", tmp_path / "new") == 0


def test_another_study_s_results_are_reused_where_configurations_are_the_same(
    done, tmp_path, capsys
):
    file, elsewhere = tmp_path / "other.json", tmp_path / "elsewhere"
    assert main(["smoke", "--output", str(done), "--report", "--export", str(file)]) == 0
    content = {"format": FORMAT, "study": {"name": "other"}, "runs": []}
    for record in results(done).values():
        label = f"what was {record['label']}"
        content["runs"].append(record | {"study": "other", "label": label, "factors": {"a": 1}})
    # Neither another seed nor another configuration is taken.
    content["runs"] += [content["runs"][0] | {"seed": 1}]
    write(file, content)
    argv = ["smoke", "--output", str(elsewhere), "--reuse", str(file), "--seeds", "0", "1"]
    assert main([*argv, "--list"]) == 0
    capsys.readouterr()
    found = results(elsewhere)
    assert sorted(found) == ["relu2-seed0", "sparse-seed0"]
    for name, record in found.items():
        assert record["final"] == results(done)[name]["final"]
        assert (record["study"], record["factors"]) == ("smoke", {})
        assert record["made_for"] == f"other: what was {record['label']}"
    study = definition.get("smoke", Options())
    assert reuse(file, study, elsewhere) == 0  # those that are there stay
    longer = dataclasses.replace(study.runs[0].config, steps=25)
    other = dataclasses.replace(study, runs=(dataclasses.replace(study.runs[0], config=longer),))
    assert reuse(file, other, tmp_path / "longer") == 0
    assert main([*argv[:3], "--reuse", "nowhere.json", "--list"]) == 2
    assert "nowhere.json is no exported study" in capsys.readouterr().err


def test_a_failure_stands_in_the_way_of_no_result_from_elsewhere(done, tmp_path):
    file, output = tmp_path / "export.json", tmp_path / "here"
    export(done, file)
    study = definition.get("smoke", Options())
    good = json.loads(file.read_text())["runs"]
    bad = {**good[0], "status": "failed", "error": "boom"}
    path = Folders(output, output).result(study.runs[0])
    for take in (lambda: unpack(file, output), lambda: reuse(file, study, output)):
        write(path, bad)
        assert take() > 0
        assert read(path)["status"] == "finished"
    # One failure is as good as another, and no result.
    write(file, json.loads(file.read_text()) | {"runs": [{**bad, "error": "bang"}]})
    write(path, bad)
    assert unpack(file, output) == 0
    assert read(path)["error"] == "boom"


def test_labels_that_share_a_file_are_not_taken_for_each_other(done, tmp_path):
    file, folders = tmp_path / "export.json", Folders(tmp_path, tmp_path)
    export(done, file)
    content = json.loads(file.read_text())
    study = definition.get("smoke", Options())
    one, two = (
        dataclasses.replace(study.runs[0], label=label) for label in ("M16 50%", "M16, 50%")
    )
    assert folders.result(one) == folders.result(two)
    write(folders.result(one), content["runs"][0] | {"label": one.label})
    assert len(plan(study, [one], folders).done) == 1
    with pytest.raises(ValueError, match="label: M16 50%, now M16, 50%"):
        plan(study, [two], folders)
    write(file, content | {"runs": [content["runs"][0] | {"label": two.label}]})
    with pytest.raises(ValueError, match=r"have one file name, M16_50_-seed0\.json"):
        unpack(file, tmp_path)


def test_each_process_gets_its_part_of_the_memory(monkeypatch):
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    for processes, fraction in ((1, 0.94), (3, 0.303)):
        monkeypatch.delenv(name, raising=False)
        reserve_memory(processes)
        assert float(os.environ[name]) == fraction
    monkeypatch.setenv(name, "0.5")
    reserve_memory(2)
    assert os.environ[name] == "0.5"
