"""Round trips, retention, configurations and arguments of checkpoints."""

import json
import logging
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from train.checkpoint import Checkpointer, CheckpointError, Restored, read_config
from train.checkpoint.compare import differences

CONFIG = {"name": "a", "steps": 100, "model": {"width": 128, "hidden": None}, "log": {"every": 1}}


def bits(leaf):
    """The bytes of a leaf, so that NaN payloads and signed zeros count."""
    if isinstance(leaf, jax.Array):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()
    return type(leaf), leaf


def assert_same(a, b):
    structures = [repr(jax.tree.structure(tree)) for tree in (a, b)]
    assert structures[0] == structures[1]
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert bits(x) == bits(y)


def abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, tree
    )


def restore(checkpointer, template, **kwargs) -> Restored:
    restored = checkpointer.restore(template, **kwargs)
    assert restored is not None
    return restored


def all_dtypes():
    random = np.random.default_rng(0)
    words = lambda n: random.integers(0, 2**32, n, dtype=np.uint32)
    return {
        # Every bit pattern is possible, NaN payloads and denormals too.
        "float32": jnp.asarray(words(3000).view(np.float32).reshape(3, 1000)),
        "bfloat16": jnp.asarray(words(501).view(jnp.bfloat16).reshape(2, 501)),
        "float16": jnp.asarray(words(4).view(np.float16)),
        "int32": jnp.asarray(words(17).view(np.int32)),
        "int8": jnp.asarray(words(4).view(np.int8)),
        "uint32": jax.random.key_data(jax.random.key(3)),
        "bool": jnp.array([True, False]),
        "scalar": jnp.int32(-7),
        "key": jax.random.key(5),
        "keys": jax.random.split(jax.random.key(6, impl="rbg"), 3),
        "empty": jnp.zeros((0, 4), jnp.bfloat16),
        "int": 12345,
        "flag": True,
        "float": 0.5,
        "nothing": None,
        "nested": [(jnp.ones(()), {"0": jnp.zeros(1)})],
    }


def nnx_state():
    class State(nnx.Variable):
        pass

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(8, 16, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.bias = State(jnp.arange(4.0))
            self.children = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])

    model = Block(nnx.Rngs(0))
    _, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1)))
    _, opt_state = optimizer.update(jax.tree.map(jnp.sin, params), optimizer.init(params), params)
    return {"params": params, "rest": rest, "opt_state": opt_state, "whole": nnx.state(model)}


@pytest.mark.core
@pytest.mark.parametrize("make", [all_dtypes, nnx_state])
def test_round_trip_is_bit_exact(tmp_path, make):
    state = make()
    host = {"data": {"position": 2**60 + 1, "epochs": [1, 2]}, "loss": 0.1}
    with Checkpointer(tmp_path / "new" / "folder", keep=1, config=CONFIG) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.restore(abstract(state)) is None
        assert checkpointer.save(3, state, host)
    with Checkpointer(tmp_path / "new" / "folder", keep=1, config=CONFIG) as checkpointer:
        restored = restore(checkpointer, abstract(state))
        assert checkpointer.latest_step() == 3
    assert (restored.step, restored.host) == (3, host)
    assert_same(state, restored.state)


def test_restored_random_keys_draw_the_same(tmp_path):
    state = {"keys": jax.random.split(jax.random.key(6, impl="rbg"), 3)}
    with Checkpointer(tmp_path, keep=1, config={}) as checkpointer:
        checkpointer.save(0, state, {})
        keys = restore(checkpointer, abstract(state)).state["keys"]
    np.testing.assert_array_equal(
        jax.random.normal(keys[1], (5,)), jax.random.normal(state["keys"][1], (5,))
    )


def test_buffers_may_be_donated_while_the_save_is_under_way(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.5 + 1, tree), donate_argnums=0)
    state = {"w": jnp.ones((1000, 500)), "b": jnp.arange(7.0), "h": jnp.ones(9, jnp.bfloat16)}
    saved = []
    with Checkpointer(tmp_path, keep=100, config={}) as checkpointer:
        for i in range(4):
            saved.append(jax.tree.map(lambda x: np.array(x, copy=True), state))
            checkpointer.save(i, state, {})
            # JAX copies what the save still reads, and reuses the buffers after that.
            for _ in range(3):
                between = step(state)
                state = step(between)
            jax.block_until_ready(state)
            assert between["w"].is_deleted()
        for i, expected in enumerate(saved):
            restored = restore(checkpointer, abstract(state), step=i)
            for name, array in expected.items():
                assert np.asarray(restored.state[name]).tobytes() == array.tobytes()


def test_host_may_change_after_save(tmp_path):
    host = {"position": [1]}
    with Checkpointer(tmp_path, keep=1, config={}) as checkpointer:
        checkpointer.save(0, {"a": jnp.ones(1)}, host)
        host["position"].append(2)
        assert restore(checkpointer, {"a": abstract(jnp.ones(1))}).host == {"position": [1]}


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    state = all_dtypes()

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    with Checkpointer(tmp_path, keep=1, config=CONFIG) as checkpointer:
        checkpointer.save(1, state, {})
        checkpointer.wait()
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(pickle, name, refuse)
        assert_same(state, restore(checkpointer, abstract(state)).state)


def test_keep_counts_good_checkpoints_and_the_newest_stay(tmp_path):
    state = {"a": jnp.ones(3)}
    with Checkpointer(tmp_path, keep=2, config={}) as checkpointer:
        for step in (1, 2, 3, 4):
            checkpointer.save(step, state, {})
        checkpointer.wait()
        assert folders(tmp_path) == ["00000003", "00000004"]
    # A damaged one takes no place: the next save leaves two good ones.
    (tmp_path / "00000004" / "config.json").unlink()
    with Checkpointer(tmp_path, keep=2, config={}) as checkpointer:
        checkpointer.save(5, state, {})
        checkpointer.wait()
        assert folders(tmp_path) == ["00000003", "00000005"]


def test_old_checkpoints_outlive_a_save_that_is_not_durable(tmp_path, monkeypatch):
    """The manifest of the new one is on disk before the old one goes."""
    from train.checkpoint import manifest

    seen = []
    write = manifest.write

    def spy(folder):
        seen.append(folders(tmp_path))
        write(folder)
        seen.append(folders(tmp_path))

    monkeypatch.setattr(manifest, "write", spy)
    with Checkpointer(tmp_path, keep=1, config={}) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"a": jnp.ones(3)}, {})
    assert seen == [[], [], ["00000001"], ["00000001"]]
    assert folders(tmp_path) == ["00000002"]


def test_saving_the_same_step_again(tmp_path):
    make = lambda value: {"a": jnp.full(3, value)}
    template = abstract(make(0.0))
    with Checkpointer(tmp_path, keep=3, config={}) as checkpointer:
        assert checkpointer.save(1, make(1.0), {})
        assert not checkpointer.save(1, make(2.0), {})
        assert restore(checkpointer, template).state["a"][0] == 1
        assert not checkpointer.save(1, make(2.0), {})
        assert checkpointer.save(1, make(3.0), {}, force=True)
        assert restore(checkpointer, template).state["a"][0] == 3
        assert folders(tmp_path) == ["00000001-1"]
    # Another process does not know what the folder holds, so it writes what it has.
    with Checkpointer(tmp_path, keep=3, config={}) as checkpointer:
        assert checkpointer.save(1, make(4.0), {})
        assert restore(checkpointer, template).state["a"][0] == 4
        assert folders(tmp_path) == ["00000001-2"]


def test_restore_of_a_chosen_step_and_of_a_part(tmp_path):
    state = {"params": jnp.ones(3), "moments": jnp.zeros(3)}
    with Checkpointer(tmp_path, keep=3, config={}) as checkpointer:
        for step in (5, 7):
            checkpointer.save(step, {**state, "params": jnp.full(3, step)}, {"step": step})
        part = {"params": abstract(jnp.full(3, 5))}
        restored = restore(checkpointer, part, step=5, partial=True)
        assert (restored.step, restored.host, int(restored.state["params"][0])) == (
            5,
            {"step": 5},
            5,
        )
        with pytest.raises(ValueError, match=r"^no checkpoint of step=6 in .*there are \[5, 7\]$"):
            checkpointer.restore(part, step=6)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"a": jax.ShapeDtypeStruct((4,), jnp.float32)}, "a is float32[3] in the checkpoint, "),
        ({"a": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}, "checkpoint, bfloat16[3] now"),
        ({"b": jax.ShapeDtypeStruct((3,), jnp.float32)}, "the checkpoint has no b"),
        ({"a": {"c": jax.ShapeDtypeStruct((3,), jnp.float32)}}, "the checkpoint has no a.c"),
        (
            {"a": jax.ShapeDtypeStruct((3,), jnp.float32), "n": 1, "more": 1},
            "the checkpoint has no more",
        ),
        ({"a": jax.ShapeDtypeStruct((3,), jnp.float32)}, "the checkpoint's n has no place"),
    ],
)
def test_a_template_of_another_form_is_refused(tmp_path, template, message):
    with Checkpointer(tmp_path, keep=1, config={}) as checkpointer:
        checkpointer.save(1, {"a": jnp.ones(3), "n": 4}, {})
        with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
            checkpointer.restore(template)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"model": {"width": 256, "hidden": None}}, "model.width: 128 in the checkpoint, 256 now"),
        ({"model": {"width": 128, "hidden": 4}}, "model.hidden: None in the checkpoint, 4 now"),
        ({"model": {"width": 128}}, "model.hidden: None in the checkpoint, absent now"),
        ({"steps": 200}, "steps: 100 in the checkpoint, 200 now"),
        ({"steps": True}, "steps: 100 in the checkpoint, True now"),
        ({"new": 1}, "new: absent in the checkpoint, 1 now"),
        ({"mesh_size": 1}, "mesh_size: absent in the checkpoint, 1 now"),
        ({"data": {"workers": 3, "source": "x"}}, "data.source: absent in the checkpoint, x now"),
    ],
)
def test_another_config_is_refused(tmp_path, change, difference):
    state = {"a": jnp.ones(3)}
    with Checkpointer(tmp_path, keep=1, config=CONFIG) as checkpointer:
        checkpointer.save(1, state, {})
    with (
        Checkpointer(tmp_path, keep=1, config={**CONFIG, **change}) as checkpointer,
        pytest.raises(ValueError, match=r"^the checkpoint is of another config: ") as caught,
    ):
        checkpointer.restore(abstract(state))
    assert difference in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fields_that_may_change_between_runs(tmp_path):
    state = {"a": jnp.ones(3)}
    with Checkpointer(tmp_path, keep=1, config=CONFIG) as checkpointer:
        checkpointer.save(1, state, {})
    changed = {
        **CONFIG,
        "name": "b",
        "output": "elsewhere",
        "log": {"every": 5, "extra": 1},
        "mesh": {"fsdp": 8},
        "checkpoint": {"every": 1},
        "profile": {"steps": "1:2"},
        "data": {"workers": 3, "threads": 1, "read_ahead": 1, "cache": "/x"},
    }
    with Checkpointer(tmp_path, keep=1, config=changed) as checkpointer:
        assert restore(checkpointer, abstract(state)).step == 1


def test_the_free_fields_are_fields_of_the_config():
    """A renamed field must not silently become one that is refused."""
    import dataclasses

    from train.checkpoint.compare import FREE_FIELDS
    from train.config import Config

    tree = dataclasses.asdict(Config())
    for field in FREE_FIELDS:
        value = tree
        for key in field.split("."):
            value = value[key]


def test_numbers_compare_by_value():
    nan = float("nan")
    assert not differences(
        {"a": 1, "b": nan, "c": [1, {"d": 2}]}, {"a": 1.0, "b": nan, "c": [1, {"d": 2}]}
    )
    assert differences({"a": {}}, {"a": {"b": 1}}) == [
        "a.b: absent in the checkpoint, 1 now",
        "a: {} in the checkpoint, absent now",
    ]


def test_read_config(tmp_path):
    with pytest.raises(ValueError, match=r"^no checkpoint in"):
        read_config(tmp_path)
    for step, name in ((1, "one"), (2, "two")):
        with Checkpointer(tmp_path, keep=2, config={"name": name}) as checkpointer:
            checkpointer.save(step, {"a": jnp.ones(3)}, {})
    assert read_config(tmp_path) == {"name": "two"}
    assert read_config(tmp_path, step=1) == {"name": "one"}
    path = tmp_path / "00000002" / "config.json"
    path.write_text(path.read_text().replace("two", "six"))
    assert read_config(tmp_path) == {"name": "one"}
    with pytest.raises(ValueError, match=r"^no checkpoint of step=2 in"):
        read_config(tmp_path, step=2)


def test_versions_are_stored(tmp_path):
    with Checkpointer(tmp_path, keep=1, config={}) as checkpointer:
        checkpointer.save(1, {"a": jnp.ones(3)}, {})
    versions = json.loads((tmp_path / "00000001" / "versions.json").read_text())
    assert set(versions) == {"format", "jax", "flax", "orbax", "sparsejax"}
    assert versions["jax"] == jax.__version__


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.save(-1, {"a": jnp.ones(1)}, {}), "step=-1 must not be negative"),
        (lambda c: c.save(0, {}, {}), "state has no arrays"),
        (lambda c: c.save(0, {"a": jnp.zeros(0)}, {}), "state has no elements"),
        (lambda c: c.save(0, {"a": "text"}, {}), "a='text' cannot be stored as an array"),
        (lambda c: c.save(0, {"a": 2**40}, {}), "a=1099511627776 cannot be stored as an array"),
        (lambda c: c.save(0, {"a": np.zeros(1)}, {}), "a is float64, which JAX would narrow"),
        (lambda c: c.save(0, {"a": jnp.ones(1)}, {"x": {1}}), "host cannot be stored as JSON"),
        (
            lambda c: c.save(0, {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}, {}),
            "two leaves of state have the same name",
        ),
    ],
)
def test_bad_arguments(tmp_path, call, message):
    with (
        Checkpointer(tmp_path, keep=1, config={}) as checkpointer,
        pytest.raises(ValueError, match=r"^[^\n]*$") as caught,
    ):
        call(checkpointer)
    assert message in str(caught.value)
    assert folders(tmp_path) == []


def test_bad_constructor_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"^keep=0 must be at least 1$"):
        Checkpointer(tmp_path, keep=0, config={})
    with pytest.raises(ValueError, match=r"^config cannot be stored as JSON"):
        Checkpointer(tmp_path, keep=1, config={"a": object()})
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"it is a file$"):
        Checkpointer(tmp_path / "file", keep=1, config={})


def test_only_our_warnings_are_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO), Checkpointer(tmp_path, keep=1, config={}) as checkpointer:
        checkpointer.save(1, {"a": jnp.ones(3)}, {})
        checkpointer.restore({"a": abstract(jnp.ones(3))})
    assert [r for r in caplog.records if "orbax" in r.pathname] == []


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
