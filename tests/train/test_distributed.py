"""Many processes: their places, one decision for all, and a run that is killed and resumed."""

import json
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train.simulated import ROOT, environment
from train.distributed import Place, any_process, find_place, first_host, initialize

SLURM = {
    "SLURM_STEP_NODELIST": "gpu[007-010,12]",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_JOB_ID": "4711",
}
PLAIN = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "2",
}


def test_one_process_needs_nothing():
    assert find_place({}) is None
    assert find_place({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}) is None  # outside of srun
    assert find_place({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert find_place({**PLAIN, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
    assert initialize({}) is None
    assert any_process(True)
    assert not any_process(False)


def test_places():
    assert find_place(PLAIN) == Place("10.0.0.1:8476", 4, 2)
    kubernetes = {k: v for k, v in PLAIN.items() if k != "JAX_PROCESS_ID"}
    assert find_place({**kubernetes, "JOB_COMPLETION_INDEX": "1"}) == Place("10.0.0.1:8476", 4, 1)
    place = find_place(SLURM)
    assert place == Place(f"gpu007:{61440 + 4711 % 4096}", 5, 3)
    # Named by hand, also inside of another job.
    assert find_place({**SLURM, **PLAIN}) == Place("10.0.0.1:8476", 4, 2)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[3,7-15]", "node3"),
        ("a-b[09]-ib,c", "a-b09-ib"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@given(st.integers(0, 10**9), st.integers(2, 4096))
def test_all_tasks_of_a_step_agree_on_the_coordinator(job, count):
    places = [
        find_place(
            {
                **SLURM,
                "SLURM_JOB_ID": str(job),
                "SLURM_STEP_NUM_TASKS": str(count),
                "SLURM_PROCID": str(index),
            }
        )
        for index in (0, count - 1)
    ]
    assert places[0].coordinator == places[1].coordinator
    assert 1024 < int(places[0].coordinator.split(":")[1]) < 65536
    assert (places[0].index, places[1].index) == (0, count - 1)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "4"}, "JAX_NUM_PROCESSES set, but not JAX_COORDINATOR_ADDRESS, JAX"),
        ({**PLAIN, "JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 must be below JAX_NUM_PROCESSES=4"),
        ({**PLAIN, "JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID='-1' must be a number"),
        ({**PLAIN, "JAX_COORDINATOR_ADDRESS": "host"}, "must be host:port"),
        ({**SLURM, "SLURM_STEP_NODELIST": "["}, "SLURM_STEP_NODELIST='[' is not a list"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "without SLURM_STEP_NODELIST, SLURM_PROCID, SLURM_JOB_ID"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS='x' must be a number"),
    ],
)
def test_environments_that_make_no_sense(environment, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        find_place(environment)
    assert message in str(error.value)


class Job:
    """Processes of one training run over localhost, each with its own simulated devices."""

    def __init__(self, folder, count, *arguments, devices=1, mesh=(1, 1), steps=12):
        with socket.socket() as server:
            server.bind(("localhost", 0))
            port = server.getsockname()[1]
        self.folder = folder
        self.log = folder / "runs" / "tiny" / "metrics.jsonl"
        command = [
            *(sys.executable, "-m", "train.main", "--config", "tiny"),
            *("--output", str(folder / "runs"), "--steps", str(steps)),
            *("--batch-size", "8", "--sequence-length", "32", "--model.width", "32"),
            *("--model.num-heads", "2", "--sparsity.m", "8", "--sparsity.v", "16"),
            *("--sparsity.refresh-every", "0", "--schedule.warmup-steps", "3"),
            *("--schedule.sparse-fraction", "0.5", "--optimizer.warmup-steps", "2"),
            *("--log.every", "1", "--log.eval-every", "0", "--log.eval-windows", "8"),
            *("--checkpoint.every", "3", "--sparsity.shards", "2"),
            *("--mesh.fsdp", str(mesh[0]), "--mesh.tensor", str(mesh[1]), *arguments),
        ]
        self.processes = []
        for index in range(count):
            place = {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
            with (folder / f"out{index}").open("w") as out:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment(devices, **place),
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(process)

    def wait_for_step(self, step):
        self.wait_until(lambda: self.step() >= step)

    def wait_until(self, done):
        end = time.monotonic() + 200
        while not done():
            assert time.monotonic() < end, self.outputs()
            assert all(p.poll() is None for p in self.processes), self.outputs()
            time.sleep(0.02)

    def step(self):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def outputs(self):
        return [(self.folder / f"out{i}").read_text() for i in range(len(self.processes))]

    def finish(self):
        codes = [process.wait(timeout=300) for process in self.processes]
        assert codes == [0] * len(codes), self.outputs()
        return self.outputs()

    def losses(self):
        records = map(json.loads, self.log.read_text().splitlines())
        return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}


@pytest.mark.processes
def test_two_processes_killed_stopped_and_resumed_on_other_meshes(tmp_path):
    """Nothing is lost: every step's loss is that of one undisturbed process on one device."""
    alone = tmp_path / "alone"
    alone.mkdir()
    job = Job(alone, 1)
    job.finish()
    want = job.losses()
    assert list(want) == list(range(1, 13))

    # Two processes of two devices; one dies without a word.
    job = Job(tmp_path, 2, devices=2, mesh=(2, 2), steps=12)
    job.wait_for_step(5)
    # Saved while later steps are under way.
    first = tmp_path / "runs" / "tiny" / "checkpoints" / "00000003"
    job.wait_until(first.is_dir)
    job.processes[1].send_signal(signal.SIGKILL)
    job.processes[1].wait()
    # The other cannot go on alone. A scheduler would end it; it may also have ended by itself.
    job.processes[0].kill()
    job.processes[0].wait()
    assert first.is_dir()

    # Resumed with fsdp over the processes; SIGTERM to the second one stops both at one step.
    job = Job(tmp_path, 2, "--resume", devices=1, mesh=(2, 1))
    job.wait_for_step(7)
    job.processes[1].send_signal(signal.SIGTERM)
    out, silent = job.finish()
    assert "continuing at step" in out
    assert "stopped by a signal after step" in out
    assert "step" not in silent, silent

    # And to the end in one process.
    job = Job(tmp_path, 1, "--resume", devices=2, mesh=(1, 2))
    job.finish()
    got = job.losses()
    assert list(got) == list(want)
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-4)
    assert not (tmp_path / "runs" / "tiny-2").exists()
