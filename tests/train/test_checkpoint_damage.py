"""Damaged checkpoints are passed over, and failed writes leave the old ones alone."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.checkpoint import Checkpointer, CheckpointError

ROOT = Path(__file__).parents[2]


def make_state(value):
    return {"w": jnp.full((30, 20), value, jnp.float32), "b": jnp.full(3, value, jnp.bfloat16)}


TEMPLATE = jax.eval_shape(lambda: make_state(0))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with checkpoints of steps 1, 2 and 3; not to be changed."""
    folder = tmp_path_factory.mktemp("good")
    with Checkpointer(folder, keep=3, config={"a": 1}) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step), {"step": step})
    return folder


@pytest.fixture
def folder(good, tmp_path):
    copy = tmp_path / "checkpoints"
    shutil.copytree(good, copy)
    return copy


def files_of(folder, step):
    root = folder / f"{step:08d}"
    return sorted(p for p in root.rglob("*") if p.is_file())


def largest_file(folder, step):
    return max(files_of(folder, step), key=lambda p: p.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def append(path):
    path.write_bytes(path.read_bytes() + b"\0")


def make_folder(path):
    path.unlink()
    path.mkdir()


def restore(folder, **kwargs):
    with Checkpointer(folder, keep=3, config={"a": 1}) as checkpointer:
        return checkpointer.restore(TEMPLATE, **kwargs)


def assert_is(restored, step):
    assert restored is not None
    assert (restored.step, restored.host) == (step, {"step": step})
    for name, array in make_state(step).items():
        np.testing.assert_array_equal(
            np.asarray(restored.state[name], np.float32), np.asarray(array, np.float32)
        )


@pytest.mark.parametrize(
    "damage", [truncate, flip, append, Path.unlink, lambda p: p.write_bytes(b""), make_folder]
)
@pytest.mark.parametrize(
    "name", ["manifest.json", "host.json", "config.json", "layout.json", "arrays/_METADATA", None]
)
def test_a_damaged_checkpoint_is_skipped_in_favour_of_the_one_before(folder, caplog, damage, name):
    damage(folder / "00000003" / name if name else largest_file(folder, 3))
    assert_is(restore(folder), 2)
    [record] = [r for r in caplog.records if r.name.startswith("train")]
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"skipping damaged checkpoint {folder / '00000003'}: ")
    assert "\n" not in record.getMessage()


def test_every_file_matters_or_is_checked(folder):
    """The loss of any file at all is noticed."""
    for path in files_of(folder, 3):
        data = path.read_bytes()
        path.unlink()
        assert_is(restore(folder), 2)
        path.write_bytes(data)
    assert_is(restore(folder), 3)


@given(st.data())
def test_no_flipped_bit_changes_what_is_restored(good, data):
    """Either the damage is seen, or (a bit of white space in the manifest) it does not matter."""
    paths = files_of(good, 3)
    path = data.draw(st.sampled_from(paths + [p for p in paths if p.name == "manifest.json"] * 3))
    original = path.read_bytes()
    if not original:
        return
    bit = data.draw(st.integers(0, 8 * len(original) - 1))
    changed = bytearray(original)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    try:
        restored = restore(good)
    finally:
        path.write_bytes(original)
    assert restored is not None
    assert_is(restored, restored.step)
    assert restored.step == 2 or path.name == "manifest.json"


def test_several_damaged_ones_and_a_stray_file(folder, caplog):
    flip(largest_file(folder, 3))
    shutil.rmtree(folder / "00000002")
    (folder / "00000002").write_text("not a folder")
    (folder / "notes.txt").write_text("mine")
    assert_is(restore(folder), 1)
    assert len([r for r in caplog.records if "damaged" in r.getMessage()]) == 2


def test_a_manifest_cannot_lead_out_of_the_checkpoint(folder, tmp_path, caplog):
    (tmp_path / "secret").write_text("x")
    path = folder / "00000003" / "manifest.json"
    path.write_text(path.read_text().replace('"host.json"', '"../../secret"'))
    assert_is(restore(folder), 2)
    assert "unreadable (it lists '../../secret')" in caplog.text


def test_if_all_are_damaged_the_run_does_not_start_afresh(folder):
    for step in (1, 2, 3):
        flip(largest_file(folder, step))
    with pytest.raises(ValueError, match=r"^no good checkpoint in .*: all checkpoints \(3\) dam"):
        restore(folder)
    # Nor does another one pass for the one that was asked for.
    with pytest.raises(ValueError, match=r"^no good checkpoint in .*: that of step=2 damaged$"):
        restore(folder, step=2)


def test_after_damage_the_step_can_be_saved_again(folder):
    flip(largest_file(folder, 3))
    with Checkpointer(folder, keep=3, config={"a": 1}) as checkpointer:
        assert_is(checkpointer.restore(TEMPLATE), 2)
        assert checkpointer.latest_step() == 2
        assert checkpointer.save(3, make_state(3), {"step": 3})
        assert checkpointer.latest_step() == 3
    assert not (folder / "00000003").exists()
    assert_is(restore(folder), 3)


def test_an_interrupted_first_save_is_not_damage(tmp_path, caplog):
    (tmp_path / ".staging" / "00000001").mkdir(parents=True)
    assert restore(tmp_path) is None
    assert "cut short" in caplog.text
    with Checkpointer(tmp_path, keep=1, config={"a": 1}) as checkpointer:
        checkpointer.save(1, make_state(1), {"step": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["00000001"]


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").touch()
    with (
        Checkpointer(tmp_path / "file" / "checkpoints", keep=1, config={}) as checkpointer,
        pytest.raises(CheckpointError, match=r"^cannot save the checkpoint of step 1 in [^\n]*$"),
    ):
        checkpointer.save(1, make_state(1), {})


def test_a_folder_that_became_unwritable(folder, monkeypatch):
    """As on a read-only file system (root ignores permissions, so mkdir is made to fail)."""

    def refuse(self, *args, **kwargs):
        raise OSError(30, "Read-only file system", str(self))

    with Checkpointer(folder, keep=3, config={"a": 1}) as checkpointer:
        checkpointer.restore(TEMPLATE)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", refuse)
            with pytest.raises(CheckpointError, match=r": Read-only file system: [^\n]*$"):
                checkpointer.save(4, make_state(4), {"step": 4})
        assert_is(checkpointer.restore(TEMPLATE), 3)
        checkpointer.save(4, make_state(4), {"step": 4})
        assert_is(checkpointer.restore(TEMPLATE), 4)


def test_a_failed_publication_is_raised_once_and_cleaned_up(folder, monkeypatch):
    from train.checkpoint import manifest

    def fail(folder):
        raise OSError(5, "Input/output error")

    with Checkpointer(folder, keep=1, config={"a": 1}) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "write", fail)
            checkpointer.save(4, make_state(4), {"step": 4})
            with pytest.raises(CheckpointError, match=r"step 4 in .*: Input/output error$"):
                checkpointer.wait()
        checkpointer.wait()
        assert sorted(p.name for p in folder.iterdir()) == ["00000001", "00000002", "00000003"]
        assert checkpointer.save(4, make_state(4), {"step": 4})
    assert_is(restore(folder), 4)


def test_a_failed_save_does_not_hide_the_error_under_way(folder, monkeypatch, caplog):
    from train.checkpoint import manifest

    def fail(folder):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(manifest, "write", fail)

    def save_and_fail():
        with Checkpointer(folder, keep=1, config={}) as checkpointer:
            checkpointer.save(4, make_state(4), {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save_and_fail()
    assert "Input/output error" in caplog.text


def test_a_full_disk(folder):
    """A limit on the size of files stands for the full disk; it needs a process of its own."""
    script = """
        import resource, sys
        import jax, jax.numpy as jnp
        from train.checkpoint import Checkpointer, CheckpointError
        folder = sys.argv[1]
        noise = {"w": jax.random.normal(jax.random.key(0), (300, 300))}
        with Checkpointer(folder, keep=1, config={"a": 1}) as checkpointer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            for step in (4, 5):
                checkpointer.save(step, noise, {})
                try:
                    checkpointer.wait()
                except CheckpointError as error:
                    print(error)
            small = {"w": jnp.ones(2)}
            checkpointer.save(6, small, {"step": 6})
            print(checkpointer.latest_step())
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines() == [
        f"cannot save the checkpoint of step {step} in {folder}: File too large" for step in (4, 5)
    ] + ["6"]
    assert result.stderr == ""
    assert [p.name for p in folder.iterdir()] == ["00000006"]


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, 1 MiB; where mounting one is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_or_read_only(disk):
    """The real thing, where the tests above put something in its place."""
    noise = {"w": jax.random.normal(jax.random.key(0), (600, 600))}
    folder = disk / "checkpoints"
    with Checkpointer(folder, keep=3, config={"a": 1}) as checkpointer:
        checkpointer.save(1, make_state(1), {"step": 1})
        checkpointer.save(2, noise, {"step": 2})
        with pytest.raises(CheckpointError, match=r"step 2 in .*: No space left on device[^\n]*$"):
            checkpointer.wait()
        assert_is(checkpointer.restore(TEMPLATE), 1)
        checkpointer.save(3, make_state(3), {"step": 3})
        checkpointer.wait()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with Checkpointer(folder, keep=3, config={"a": 1}) as checkpointer:
        assert_is(checkpointer.restore(TEMPLATE), 3)
        with pytest.raises(CheckpointError, match=r"step 4 in .*: Read-only file system[^\n]*$"):
            checkpointer.save(4, make_state(4), {"step": 4})
    assert_is(restore(folder), 3)
