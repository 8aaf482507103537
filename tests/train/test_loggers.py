"""TensorBoard and Weights & Biases get the numbers; a missing package is named."""

import dataclasses
import math
import sys
import types

import pytest

from tests.train.test_loop import SILENT, records, two_steps
from train import loggers
from train.config import Config, LogConfig
from train.loop import train
from train.metrics import RunLogger


def run_logger(folder, sinks):
    return RunLogger(
        folder, total_steps=100, tokens_per_step=1, flops_per_step=1.0, peak_flops=None, sinks=sinks
    )


def record(log):
    log.log(10, "dense", {"loss": 2.0, "grad_norm": math.nan, "expert_load": [[1, 3]]})
    log.eval(10, {"loss_dense": 1.5})


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: keeps what it is given."""

    class Error(Exception):
        pass

    class Run:
        def __init__(self, **options):
            self.options, self.logged, self.exit_code = options, [], None

        def log(self, values, *, step):
            self.logged.append((step, values))

        def finish(self, exit_code):
            self.exit_code = exit_code

    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace()  # what find_spec returns
    module.Error, module.runs = Error, []

    def init(**options):
        module.runs.append(Run(**options))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def config(**log):
    return Config(log=LogConfig(**log))


def test_by_default_there_are_none(tmp_path):
    assert loggers.open_sinks(config(), tmp_path, 0) == []
    assert list(tmp_path.iterdir()) == []


def test_wandb_gets_finite_numbers_by_step(tmp_path, wandb):
    chosen = config(wandb=True, wandb_project="p", wandb_entity="e")
    folder = tmp_path / "tiny-2"
    folder.mkdir()
    with run_logger(folder, loggers.open_sinks(chosen, folder, 0)) as log:
        record(log)
    (run,) = wandb.runs
    assert run.options["project"] == "p"
    assert run.options["entity"] == "e"
    assert run.options["name"] == "tiny-2"
    assert run.options["config"] == dataclasses.asdict(chosen)
    (train_step, train), (eval_step, held_out) = run.logged
    assert train_step == eval_step == 10
    assert train["train/loss"] == 2.0
    assert train["train/expert_load_max"] == 1.5
    assert "train/grad_norm" not in train  # not a number
    assert "train/step" not in train
    assert held_out["eval/loss_dense"] == 1.5
    assert run.exit_code == 0


def test_a_resumed_run_is_the_same_one_at_wandb(tmp_path, wandb):
    for start in (0, 50):
        loggers.open_sinks(config(wandb=True), tmp_path, start)
    first, second = wandb.runs
    assert first.options["id"] == second.options["id"]
    assert second.options["resume"] == "allow"
    other = tmp_path / "other"
    other.mkdir()
    loggers.open_sinks(config(wandb=True), other, 0)
    assert wandb.runs[-1].options["id"] != first.options["id"]


def test_an_error_is_passed_on_to_wandb(tmp_path, wandb):
    sinks = loggers.open_sinks(config(wandb=True), tmp_path, 0)
    with pytest.raises(ZeroDivisionError), run_logger(tmp_path, sinks):
        _ = 1 / 0
    assert wandb.runs[0].exit_code == 1


def test_wandb_refusing_to_start_is_one_line(tmp_path, wandb, monkeypatch):
    def init(**options):
        raise wandb.Error("api_key not configured\n  (no-tty)")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ValueError, match=r"not configured \(no-tty\) \(`wandb login`") as error:
        loggers.open_sinks(config(wandb=True), tmp_path, 0)
    assert "\n" not in str(error.value)


def test_a_run_that_wandb_refuses_is_not_the_one_to_resume(tmp_path, wandb, monkeypatch):
    def init(**options):
        raise wandb.Error("api_key not configured")

    monkeypatch.setattr(wandb, "init", init)
    config = two_steps(
        tmp_path,
        log=LogConfig(wandb=True),
    )
    with pytest.raises(ValueError, match="not configured"):
        train(config, console=SILENT)
    with pytest.raises(ValueError, match="nothing to resume"):
        train(config, resume=True, console=SILENT)


def test_a_quiet_host_writes_to_no_sink(tmp_path, wandb):
    sinks = loggers.open_sinks(config(wandb=True), tmp_path, 0)
    with RunLogger(
        tmp_path, total_steps=100, tokens_per_step=1, flops_per_step=1.0, sinks=sinks, active=False
    ) as log:
        record(log)
    assert wandb.runs[0].logged == []


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    with run_logger(tmp_path, loggers.open_sinks(config(tensorboard=True), tmp_path, 0)) as log:
        record(log)
    (file,) = tmp_path.glob("events.out.tfevents.*")
    content = file.read_bytes()
    assert b"train/loss" in content
    assert b"eval/loss_dense" in content
    assert b"train/grad_norm" not in content  # not a number


def test_tensorboard_without_its_package_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    chosen = dataclasses.replace(config(tensorboard=True), output=str(tmp_path))
    with pytest.raises(ValueError, match=r'log.tensorboard=True .*: pip install "tens') as error:
        train(chosen)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_wandb_without_its_package_is_a_warning_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    chosen = two_steps(
        tmp_path,
        log=LogConfig(wandb=True, every=1, eval_every=0, eval_windows=4),
    )
    result = train(chosen, console=SILENT)
    assert result.finished
    assert [r["step"] for r in records(result.folder) if r["kind"] == "train"] == [1, 2]
    [message] = [r.getMessage() for r in caplog.records if r.name == "train.loggers"]
    assert message.startswith("log.wandb=True needs wandb, which is not installed")
    assert "\n" not in message


def test_wandb_itself_offline(tmp_path, monkeypatch):
    """The package, with no network: what was logged is in its file."""
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with run_logger(tmp_path, loggers.open_sinks(config(wandb=True), tmp_path, 0)) as log:
        record(log)
    # finish() only tells the package's own process to end the run's file; that process's end, which
    # Python's exit waits for, is when it is whole.
    wandb.teardown()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    for name in (b"train/loss", b"eval/loss_dense"):
        assert name in content
