"""Checkpoints across processes: killed ones, other meshes, several at once."""

import json
import os
import random
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.checkpoint import Checkpointer

ROOT = Path(__file__).parents[2]


def spawn(script, *args, devices=1):
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script, *args, devices=1):
    process = spawn(script, *args, devices=devices)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


# Saves steps one after the other and says which are durable; the state of step n is all n. Given
# the name of a function, kills itself as soon as that is called in the third save.
SAVER = """
    import os, pathlib, shutil, signal, sys
    import jax.numpy as jnp
    from train.checkpoint import Checkpointer, manifest
    folder, point = sys.argv[1:]
    with Checkpointer(folder, keep=2, config={}) as checkpointer:
        first = (checkpointer.latest_step() or 0) + 1
        for step in range(first, first + 1000):
            if point and step == first + 2:
                def die(*args, **kwargs):
                    os.kill(os.getpid(), signal.SIGKILL)
                owner, name = {
                    "manifest": (manifest, "write"),
                    "write_durably": (manifest, "write_durably"),
                    "rename": (pathlib.Path, "rename"),
                    "prune": (checkpointer, "_prune"),
                    "rmtree": (shutil, "rmtree"),
                }[point]
                checkpointer.wait()
                if point == "rmtree":
                    # The first call of a save empties the staging folder; the next one deletes.
                    rmtree = shutil.rmtree
                    def die_later(path, *args, **kwargs):
                        if not str(path).endswith(".staging"):
                            os.unlink(path / "manifest.json")
                            die()
                        rmtree(path, *args, **kwargs)
                    shutil.rmtree = die_later
                else:
                    setattr(owner, name, die)
            state = {"w": jnp.full((200, 1000), step), "b": jnp.full(3, step)}
            checkpointer.save(step, state, {"step": step})
            if step % 2:
                checkpointer.wait()
                print(step, flush=True)
"""


def check_last(folder, at_least):
    template = {
        "w": jax.ShapeDtypeStruct((200, 1000), jnp.int32),
        "b": jax.ShapeDtypeStruct((3,), jnp.int32),
    }
    with Checkpointer(folder, keep=2, config={}) as checkpointer:
        restored = checkpointer.restore(template)
    assert restored is not None
    assert restored.step >= at_least
    assert restored.host == {"step": restored.step}
    for leaf in restored.state.values():
        np.testing.assert_array_equal(leaf, restored.step)
    return restored.step


@pytest.mark.parametrize("point", ["manifest", "write_durably", "rename", "prune", "rmtree"])
def test_killed_at_a_bad_moment(tmp_path, point, caplog):
    process = spawn(SAVER, tmp_path, point)
    _, err = process.communicate(timeout=120)
    assert process.returncode == -9, err
    # The first two saves were durable; the third only if the kill came after its renaming.
    assert check_last(tmp_path, 2) == (3 if point in ("prune", "rmtree") else 2)
    assert "damaged" not in caplog.text


def test_killed_at_random_moments(tmp_path, caplog):
    generator = random.Random(1)
    durable = 0
    for _ in range(4):
        process = spawn(SAVER, tmp_path, "")
        lines = [int(process.stdout.readline())]
        time.sleep(generator.uniform(0, 0.4))
        process.kill()
        lines += [int(line) for line in process.stdout.read().split("\n")[:-1]]
        process.wait()
        durable = check_last(tmp_path, max(durable, *lines))
    assert "damaged" not in caplog.text


def test_restore_on_another_mesh(tmp_path):
    """Saved on 8 devices, restored on 1 in another process, and the other way round."""
    common = """
        import sys
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from train.checkpoint import Checkpointer
        folder = sys.argv[1]
        mesh = lambda *shape: jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2)
        specs = {"w": P("x", "y"), "v": P(None, "x"), "b": P(), "key": P()}
        def make():
            return {
                "w": jax.random.normal(jax.random.key(0), (16, 32)),
                "v": jax.random.normal(jax.random.key(1), (4, 8), jnp.bfloat16),
                "b": jnp.int32(3),
                "key": jax.random.key(7),
            }
        place = lambda name, mesh: NamedSharding(mesh, specs[name])
        def template(mesh):
            return {
                name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(name, mesh))
                for name, x in make().items()
            }
        def check(state, mesh):
            for name, expected in make().items():
                sharding = place(name, mesh)
                assert state[name].sharding.is_equivalent_to(sharding, expected.ndim), name
                pair = (expected, state[name])
                if name == "key":
                    pair = map(jax.random.key_data, pair)
                assert len({np.asarray(x).tobytes() for x in pair}) == 1, name
    """
    eight = """
        with Checkpointer(folder, keep=5, config={"mesh": {"fsdp": 4}}) as checkpointer:
            old, new = mesh(4, 2), mesh(2, 4)
            state = {name: jax.device_put(x, place(name, old)) for name, x in make().items()}
            checkpointer.save(1, state, {})
            check(checkpointer.restore(template(new)).state, new)
    """
    one = """
        with Checkpointer(folder, keep=5, config={"mesh": {"fsdp": 1}}) as checkpointer:
            state = checkpointer.restore(template(mesh(1, 1))).state
            check(state, mesh(1, 1))
            checkpointer.save(2, state, {})
    """
    back = """
        with Checkpointer(folder, keep=5, config={}) as checkpointer:
            restored = checkpointer.restore(template(mesh(8, 1)))
            assert restored.step == 2
            check(restored.state, mesh(8, 1))
    """
    common = textwrap.dedent(common)
    run(common + textwrap.dedent(eight), tmp_path, devices=8)
    run(common + textwrap.dedent(one), tmp_path)
    run(common + textwrap.dedent(back), tmp_path, devices=8)


def test_two_processes_of_one_run(tmp_path):
    """Each writes its half; damage, refusals and failures are the same for both."""
    script = """
        import json, logging, sys
        import jax, numpy as np
        port, rank, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
        jax.distributed.initialize(f"localhost:{port}", 2, rank)
        from pathlib import Path
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from train.checkpoint import Checkpointer, CheckpointError, manifest
        sharding = NamedSharding(jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,)), P("x"))
        make = lambda value: {"w": jax.make_array_from_process_local_data(
            sharding, np.full((2, 3), value + 0.5 * rank, np.float32))}
        template = {"w": jax.ShapeDtypeStruct((4, 3), np.float32, sharding=sharding)}
        def local(restored):
            return np.asarray(restored.state["w"].addressable_data(0)).ravel().tolist()
        said = []
        def attempt(function):
            try:
                function()
            except (CheckpointError, ValueError) as error:
                said.append(f"{type(error).__name__}: {error}")
        with Checkpointer(folder, keep=2, config={"a": 1}) as checkpointer:
            said.append(checkpointer.restore(template))
            for step in (1, 2, 3):
                checkpointer.save(step, make(step), {"step": step})
            said.append(checkpointer.latest_step())
            said.append(local(checkpointer.restore(template)))
            if rank == 0:
                write, manifest.write = manifest.write, lambda folder: 1 / 0
            checkpointer.save(4, make(4), {})
            attempt(checkpointer.wait)
            if rank == 0:
                manifest.write = write
                (Path(folder) / "00000003" / "host.json").write_text("{}")
            restored = checkpointer.restore(template)
            said += [restored.step, local(restored)]
            attempt(lambda: checkpointer.restore(template, step=9))
        with Checkpointer(folder, keep=2, config={"a": 2}) as checkpointer:
            attempt(lambda: checkpointer.restore(template))
        print(json.dumps(said))
    """
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    processes = [spawn(script, port, rank, tmp_path) for rank in (0, 1)]
    said = []
    for rank, process in enumerate(processes):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        said.append(json.loads(out.splitlines()[-1]))
        half = lambda value, rank=rank: [value + 0.5 * rank] * 6
        cause = "division by zero" if rank == 0 else None
        assert said[rank] == [
            None,
            3,
            half(3),
            f"CheckpointError: cannot save the checkpoint of step 4 in {tmp_path}: {cause}"
            if rank == 0
            else f"CheckpointError: cannot save a checkpoint in {tmp_path}: process 0 failed",
            2,
            half(2),
            f"ValueError: no checkpoint of step=9 in {tmp_path}; there are [2, 3]",
            "ValueError: the checkpoint is of another config: a: 1 in the checkpoint, 2 now",
        ]
