"""What goes wrong around a run ends in one clear line, and the steps that were done are kept.

Elsewhere: full disks, unwritable folders, truncated and bit-flipped files of checkpoints in
`tests/train/test_checkpoint_damage.py`; damaged, missing and mixed-up shards at the start of a run
in `tests/train/test_data_sources.py`; a learning rate that explodes in `tests/train/test_loop.py`.
"""

import errno
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train.loop
import train.step
from train import main
from train.data import shards
from train.metrics import RunLogger

STEPS, CHECKPOINT = 8, 3
ARGUMENTS = [
    *("--config", "tiny", "--steps", str(STEPS), "--batch-size", "2", "--sequence-length", "16"),
    *("--model.width", "16", "--model.num-layers", "1", "--model.num-heads", "1"),
    *("--model.hidden", "16", "--schedule.warmup-steps", "0", "--schedule.sparse-fraction", "0"),
    *("--optimizer.warmup-steps", "1", "--log.eval-windows", "2", "--log.eval-every", "0"),
    *("--log.every", "1", "--checkpoint.every", str(CHECKPOINT), "--data.no-shuffle"),
    *("--data.threads", "1", "--data.read-ahead", "1"),
]


def data(folder):
    """Writes a shard of bytes, and validation in another; the arguments that name them."""
    tokens = np.random.default_rng(0).integers(0, 256, 5000).astype("<u2")
    source, validation = folder / "train.bin", folder / "val.bin"
    tokens.tofile(source)
    tokens[:500].tofile(validation)
    return ["--data.source", str(source), "--data.validation", str(validation)]


@pytest.fixture
def source(tmp_path):
    """The shard that `run` trains on."""
    return tmp_path / "train.bin"


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command line; returns the exit code, standard output and the lines of errors."""
    named = data(tmp_path)
    output = tmp_path / "out"

    def run(*arguments):
        code = main.main([*ARGUMENTS, *named, "--output", str(output), *arguments])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


def losses(tmp_path):
    lines = (tmp_path / "out" / "tiny" / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"}


def checkpoints(tmp_path):
    folder = tmp_path / "out" / "tiny" / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses, by step, of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main.main([*ARGUMENTS, *data(folder), "--output", str(folder / "out")]) == 0
    return losses(folder)


def finishes(run, tmp_path, start, undisturbed):
    """The run goes on from `start` and ends as one that nothing had happened to."""
    code, out, err = run("--resume")
    assert (code, err) == (0, [])
    assert f"continuing at step {start}" in " ".join(out.split())
    assert losses(tmp_path) == undisturbed


def test_a_nan_in_a_gradient_is_named_and_never_saved(
    run, tmp_path, source, undisturbed, monkeypatch
):
    # The row that step 5 (the fourth of a row a sample, two a step) reads first.
    row = np.fromfile(source, "<u2")[8 * 17 :][:16].astype(np.int32)
    accumulate = train.step._accumulate

    def poisoned(gradient, batch, parts):
        result, grads = accumulate(gradient, batch, parts)
        bad = jnp.all(batch["inputs"][0] == row)
        first, *rest = jax.tree.leaves(grads)
        first = first.at[(0,) * first.ndim].set(jnp.where(bad, jnp.nan, first.ravel()[0]))
        return result, jax.tree.unflatten(jax.tree.structure(grads), [first, *rest])

    with monkeypatch.context() as patch:
        patch.setattr(train.step, "_accumulate", poisoned)
        # Looked at every fourth step only, and still no later step hides it.
        code, _, err = run("--log.every", "4")
    assert code == 1
    assert err == [
        "error: grad_norm is nan at step 5 of 8; last good checkpoint: step 3, in "
        f"{tmp_path / 'out' / 'tiny'}"
    ]
    assert checkpoints(tmp_path) == [3]
    code, _, err = run("--resume")
    assert (code, err) == (0, [])
    mine = losses(tmp_path)
    assert mine == {step: undisturbed[step] for step in mine}
    assert mine.keys() >= {4, 5, 6, 7, 8}


def test_a_nan_after_a_save_that_failed_names_the_checkpoint_that_is_there(
    run, tmp_path, monkeypatch
):
    from train.checkpoint import manifest

    write = manifest.write

    def full(folder):
        if int(folder.name) == 6:
            time.sleep(0.5)  # still under way when the next step is looked at
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder)

    on_host = train.loop._Run._require_finite

    def poisoned(this, unread):
        changed = [(s, p, m | {"loss": np.nan} if s == 7 else m) for s, p, m in unread]
        on_host(this, changed)

    monkeypatch.setattr(manifest, "write", full)
    monkeypatch.setattr(train.loop._Run, "_require_finite", poisoned)
    code, out, [line] = run()
    assert code == 1
    assert "loss is nan at step 7 of 8; last good checkpoint: step 3, in " in line
    assert "cannot save the checkpoint of step 6" in " ".join(out.split())
    assert checkpoints(tmp_path) == [3]


def test_a_shard_truncated_during_the_run(run, tmp_path, source, undisturbed, monkeypatch):
    """Memory beyond the end of a mapped file must not be touched: that is a bus error."""
    whole = source.read_bytes()
    log = RunLogger.log

    def truncate(logger, step, *args, **kwargs):
        if step == 4:
            os.truncate(source, 100)
        return log(logger, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RunLogger, "log", truncate)
        code, _, [line] = run()
    assert code == 1
    assert f"error: token shard {source} has shrunk from 10000 to 100 bytes" in line
    [done] = [step for step in checkpoints(tmp_path) if step > CHECKPOINT]
    assert line.endswith(f"; step {done} is saved, continue with --resume")
    # Still truncated: other data than the run's. Missing: no data.
    code, _, [line] = run("--resume")
    assert code == 2
    assert "other data" in line
    source.unlink()
    code, _, [line] = run("--resume")
    assert code == 2
    assert "train.bin' does not exist" in line
    source.write_bytes(whole)
    finishes(run, tmp_path, done, undisturbed)


def test_a_token_beyond_the_vocabulary_during_the_run(
    run, tmp_path, source, undisturbed, monkeypatch
):
    # In a source too large to be looked at whole when it is opened.
    monkeypatch.setattr(shards, "_WHOLE_TOKENS", 50)
    monkeypatch.setattr(shards, "_SAMPLES", 2)
    monkeypatch.setattr(shards, "_SAMPLE_TOKENS", 10)
    good = np.fromfile(source, "<u2")
    bad = good.copy()
    bad[10 * 17 + 3] = 999  # read by the sixth step
    bad.tofile(source)
    code, _, [line] = run()
    assert code == 1
    assert f"train.bin: token id 999 at position {10 * 17 + 3}" in line
    assert line.endswith("; step 5 is saved, continue with --resume")
    good.tofile(source)
    finishes(run, tmp_path, 5, undisturbed)


def test_a_log_that_cannot_be_written(run, tmp_path, monkeypatch):
    write = RunLogger._write

    def full(logger, record):
        if record["step"] == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(logger.path))
        write(logger, record)

    with monkeypatch.context() as patch:
        patch.setattr(RunLogger, "_write", full)
        code, _, [line] = run()
    assert code == 1
    assert "No space left on device" in line
    assert "metrics.jsonl" in line
    assert line.endswith("; step 5 is saved, continue with --resume")
    code, _, err = run("--resume")
    assert (code, err) == (0, [])
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 6, 7, 8]  # of step 5 only the line is lost


def test_a_picture_that_cannot_be_written(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(train.loop, "loss_plot", full)
    code, _, [line] = run()
    # Not 2, which says that nothing has been started.
    assert code == 1
    assert "No space left on device" in line
    assert checkpoints(tmp_path) == [3, 6, 8]


def test_a_checkpoint_that_cannot_be_written(run, tmp_path, undisturbed, monkeypatch):
    from train.checkpoint import manifest

    write = manifest.write

    def full(folder):
        if int(folder.name) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full)
        code, _, [line] = run()
    assert code == 1
    assert "cannot save the checkpoint of step 6" in line
    assert "No space left on device" in line
    assert checkpoints(tmp_path) == [3]
    finishes(run, tmp_path, 3, undisturbed)


def test_an_output_folder_that_cannot_be_made(run, tmp_path):
    (tmp_path / "out").write_text("a file")
    code, _, [line] = run()
    assert code == 2
    assert line.startswith("error: ")
    assert str(tmp_path / "out") in line
