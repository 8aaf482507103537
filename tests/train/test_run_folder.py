"""Every run has a folder of its own, and the newest is the one that goes on."""

import multiprocessing
import shutil

import pytest

from train.config import Config
from train.run_folder import disown, new_folder, resumable_folder


def _claim(output, start, found):
    start.wait()
    found.put(new_folder(Config(name="x", output=output)).name)


def test_runs_that_start_together_get_folders_of_their_own(tmp_path):
    config = Config(name="x", output=str(tmp_path / "runs"))
    # Nothing is in the first one yet when the second looks.
    assert [new_folder(config).name for _ in range(3)] == ["x", "x-2", "x-3"]


@pytest.mark.processes
def test_processes_that_start_together_get_folders_of_their_own(tmp_path):
    context = multiprocessing.get_context("spawn")
    start, found = context.Barrier(4), context.Queue()
    arguments = (str(tmp_path), start, found)
    started = [context.Process(target=_claim, args=arguments) for _ in range(4)]
    for process in started:
        process.start()
    names = sorted(found.get(timeout=120) for _ in started)
    for process in started:
        process.join()
    assert names == ["x", "x-2", "x-3", "x-4"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "x").mkdir()
    assert new_folder(Config(name="x", output=str(tmp_path))) == tmp_path / "x"


def test_other_names_are_other_runs(tmp_path):
    for name in ("x-1", "x-02", "x-y", "xx", "x-2.old"):
        new_folder(Config(name=name, output=str(tmp_path)))
    config = Config(name="x", output=str(tmp_path))
    with pytest.raises(ValueError, match="nothing to resume"):
        resumable_folder(config)
    assert new_folder(config) == tmp_path / "x"


def test_a_file_of_the_name_is_left_alone(tmp_path):
    (tmp_path / "x").write_text("mine")
    assert new_folder(Config(name="x", output=str(tmp_path))) == tmp_path / "x-2"
    assert (tmp_path / "x").read_text() == "mine"


def test_the_newest_goes_on_although_an_older_one_was_deleted(tmp_path):
    config = Config(name="x", output=str(tmp_path))
    first, second = new_folder(config), new_folder(config)
    shutil.rmtree(first)
    assert resumable_folder(config) == second
    # Not in the gap: there it would look older than the second.
    third = new_folder(config)
    assert resumable_folder(config) == third
    disown(third)
    assert resumable_folder(config) == second
