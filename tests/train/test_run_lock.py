"""Only one process at a time trains in a run's folder."""

import errno
import io
import multiprocessing
import os
import signal
import socket

import pytest

from tests.train.test_loop import SILENT, two_steps
from train import run_lock
from train.loop import train
from train.metrics import RunLogger
from train.run_lock import LOCK, alone_in


def test_a_second_one_is_told_who_has_the_folder(tmp_path):
    with alone_in(tmp_path) as folder:
        assert folder == tmp_path
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(ValueError, match=f"trained by {owner}: stop that") as error:
            alone_in(tmp_path).__enter__()
        assert "\n" not in str(error.value)
        # Whoever is refused takes nothing from who is not.
        with pytest.raises(ValueError, match=owner):
            alone_in(tmp_path).__enter__()
    with alone_in(tmp_path):
        pass


def _hold(folder, held):
    with alone_in(folder):
        held.set()
        signal.pause()


def test_a_killed_process_holds_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held), daemon=True)
    process.start()
    assert held.wait(timeout=120)
    with pytest.raises(ValueError, match=f"process {process.pid} on"):
        alone_in(tmp_path).__enter__()
    process.kill()
    process.join()
    with alone_in(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    with alone_in(tmp_path), alone_in(tmp_path):
        pass
    messages = [r.getMessage() for r in caplog.records if r.name == "train.run_lock"]
    assert len(messages) == 2
    assert f"cannot be locked ([Errno {errno.ENOLCK}]" in messages[0]


def test_on_a_full_disk_the_lock_is_held_without_a_name(tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_lock, "open", lambda path, *_, **__: Full(path, "a+"), raising=False)
    with alone_in(tmp_path), pytest.raises(ValueError, match="trained by another process"):
        alone_in(tmp_path).__enter__()


def test_a_folder_that_cannot_be_written_gets_a_warning(tmp_path, caplog):
    with alone_in(tmp_path / "missing"):
        pass
    (message,) = [r.getMessage() for r in caplog.records if r.name == "train.run_lock"]
    assert "missing cannot be locked" in message


def test_a_run_holds_its_folder_to_the_end(tmp_path, monkeypatch):
    logged = RunLogger.summary

    def summary(self, values):
        with pytest.raises(ValueError, match=f"trained by process {os.getpid()}"):
            alone_in(self.path.parent).__enter__()
        return logged(self, values)

    monkeypatch.setattr(RunLogger, "summary", summary)
    result = train(two_steps(tmp_path), console=SILENT)
    assert result.finished
    with alone_in(result.folder):
        pass


def test_a_run_that_is_being_trained_is_not_resumed(tmp_path):
    config = two_steps(tmp_path)
    folder = train(config, console=SILENT).folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with alone_in(folder):
        with pytest.raises(ValueError, match="is being trained by process"):
            train(config, resume=True, console=SILENT)
        after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != LOCK}
    assert after == {path: time for path, time in before.items() if path.name != LOCK}
    assert train(config, resume=True, console=SILENT).finished
