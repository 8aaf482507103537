"""Which backend serves a call: by device, strictly when named, visibly when it falls back."""

import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import reference, registry

pytestmark = pytest.mark.core


@pytest.fixture
def fake(monkeypatch):
    """Installs kernels.<backend>.twice for the two GPU backends; returns what was called."""
    calls: list[str] = []
    monkeypatch.setattr(registry, "_reported", set())

    def install(backend: str, refuses: str | None = None) -> None:
        def twice(x):
            calls.append(backend)
            return 2 * x

        def check(x):
            if refuses:
                raise NotImplementedError(refuses)

        module = types.ModuleType(f"kernels.{backend}.twice")
        module.twice, module.check_twice = twice, check  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"kernels.{backend}.twice", module)

    def reference_twice(x):
        calls.append("reference")
        return 2 * x

    monkeypatch.setattr(reference, "twice", reference_twice, False)
    monkeypatch.setattr(reference, "check_twice", lambda x: None, False)
    install.calls = calls  # type: ignore[attr-defined]
    return install


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((9, 0), ("hopper", "triton", "reference")),
        ((8, 0), ("triton", "reference")),
        ((8, 9), ("triton", "reference")),
        ((10, 0), ("triton", "reference")),
        ((7, 5), ("reference",)),
    ],
)
def test_order_by_capability(capability, expected):
    with registry.assume_capability(capability):
        assert registry.available_backends() == expected


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="describes a machine without a GPU")
def test_cpu_takes_the_reference_without_a_word():
    assert registry.target_capability() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend, function = registry.select(
            "pack24", np.ones((64, 64), np.float32), axis=1, mode="magnitude"
        )
    assert (backend, function) == ("reference", reference.pack24)


def test_fastest_backend_first(fake):
    fake("hopper")
    fake("triton")
    with registry.assume_capability((9, 0)):
        registry.call("twice", jnp.ones(3))
    with registry.assume_capability((8, 6)):
        registry.call("twice", jnp.ones(3))
    assert fake.calls == ["hopper", "triton"]


def test_falls_back_visibly_once_for_each_shape(fake):
    fake("hopper", refuses="rows=3 is odd")
    fake("triton")
    with registry.assume_capability((9, 0)):
        with pytest.warns(registry.FallbackWarning, match="'triton'.*hopper: rows=3 is odd"):
            registry.call("twice", jnp.ones(3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            registry.call("twice", jnp.ones(3))
        with pytest.warns(registry.FallbackWarning):
            registry.call("twice", jnp.ones(5))
    # Traced once for each shape.
    assert fake.calls == ["triton"] * 2


@pytest.mark.parametrize("out_dtype", [jnp.float32, np.dtype("float32"), "float32"])
def test_reports_calls_with_any_kind_of_dtype(out_dtype, monkeypatch):
    def refuse(*arguments, **options):
        raise NotImplementedError("no")

    monkeypatch.setattr(registry, "_reported", set())
    module = types.ModuleType("kernels.triton.spmm24")
    module.spmm24, module.check_spmm24 = refuse, refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels.triton.spmm24", module)
    values, metadata = reference.pack24(np.ones((64, 64), np.float32), axis=1, mode="magnitude")
    b = jnp.ones((8, 64), jnp.bfloat16)
    with registry.assume_capability((8, 0)), pytest.warns(registry.FallbackWarning, match="no"):
        out = registry.spmm24(values, metadata, b, b_layout="nk", out_dtype=out_dtype)
    assert out.dtype == jnp.float32


def test_falls_back_when_a_backend_lacks_the_op(fake):
    fake("hopper", refuses="no")
    with (
        registry.assume_capability((9, 0)),
        pytest.warns(registry.FallbackWarning, match="triton.*has no"),
    ):
        registry.call("twice", jnp.ones(3))
    assert fake.calls == ["reference"]


def test_named_backend_is_strict(fake):
    fake("hopper", refuses="rows=3 is odd")
    fake("triton")
    with registry.assume_capability((9, 0)):
        with pytest.raises(NotImplementedError, match="rows=3 is odd"):
            registry.call("twice", jnp.ones(3), backend="hopper")
        registry.call("twice", jnp.ones(3), backend="triton")
        registry.call("twice", jnp.ones(3), backend="reference")
    with (
        registry.assume_capability((8, 0)),
        pytest.raises(NotImplementedError, match=r"capability 9.0, not \(8, 0\)"),
    ):
        registry.call("twice", jnp.ones(3), backend="hopper")
    assert fake.calls == ["triton", "reference"]


def test_wrong_arguments_are_not_a_reason_to_fall_back(fake, monkeypatch):
    fake("hopper")

    def check(x):
        raise ValueError("x is wrong")

    monkeypatch.setattr(sys.modules["kernels.hopper.twice"], "check_twice", check)
    with registry.assume_capability((9, 0)), pytest.raises(ValueError, match="x is wrong"):
        registry.call("twice", jnp.ones(3))


def test_decided_again_when_the_assumed_device_changes(fake):
    fake("hopper")
    fake("triton")
    function = jax.jit(lambda x: registry.call("twice", x))
    for capability in ((9, 0), (8, 0)):
        with registry.assume_capability(capability):
            np.testing.assert_array_equal(function(jnp.ones(3)), 2)
    assert fake.calls == ["hopper", "triton"]


def test_hopper_kernels_run_one_after_the_other_under_vmap(monkeypatch):
    shapes = []

    def scaled(x, *, scale, power):
        shapes.append((x.shape, scale.shape))
        return scale * x**power

    module = types.ModuleType("kernels.hopper.scaled")
    module.scaled = scaled  # type: ignore[attr-defined]
    module.check_scaled = lambda *arguments, **options: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels.hopper.scaled", module)
    x, scale = jnp.arange(12.0).reshape(4, 3), jnp.arange(4.0)

    def function(x, scale):
        return registry.call("scaled", x, scale=scale, power=2)

    with registry.assume_capability((9, 0)):
        both = jax.vmap(function)(x, scale)
        one = jax.vmap(function, in_axes=(0, None))(x, scale[3])
    np.testing.assert_array_equal(both, scale[:, None] * x**2)
    np.testing.assert_array_equal(one, 3 * x**2)
    # The kernel never saw a batch.
    assert set(shapes) == {((3,), ())}


def test_refuses_unknown_names():
    with pytest.raises(ValueError, match="backend='cutlass'"):
        registry.call("pack24", jnp.ones((64, 64)), backend="cutlass")  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="op='pack48'"):
        registry.call("pack48", jnp.ones((64, 64)), backend="reference")
    with pytest.raises(ValueError, match="named backend"):
        registry.call("pack24", jnp.ones((64, 64)), axis=1, mode="magnitude", config=object())


def test_wrappers_reach_the_reference():
    x = jax.random.normal(jax.random.key(0), (64, 64))
    values, metadata = registry.pack24(x, axis=1, mode="magnitude", backend="reference")
    b = jnp.ones((16, 64), jnp.bfloat16)
    out = registry.spmm24(values, metadata, b, b_layout="nk", backend="reference")
    np.testing.assert_array_equal(out, reference.spmm24(values, metadata, b, b_layout="nk"))


def test_gpu_compilers_are_not_imported_on_a_cpu():
    code = (
        "import sys, jax, jax.numpy as jnp\n"
        "from kernels import registry\n"
        "registry.pack24(jnp.ones((64, 64)), axis=1, mode='magnitude')\n"
        "loaded = [m for m in sys.modules if 'pallas' in m or m.startswith('kernels.')]\n"
        "assert set(loaded) == {'kernels.reference', 'kernels.registry'}, loaded\n"
    )
    environment = {"JAX_PLATFORMS": "cpu", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("scale", [0.5, np.float32(0.5), np.asarray(0.5), jnp.float32(0.5)])
def test_a_scale_is_data(scale):
    """Of whatever type: another value must not be another compilation."""
    x = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    registry.pack24(x, axis=1, mode="value", scale=jnp.float32(0.25))
    traces = registry.traced_once(reference.pack24, ("axis", "mode"))._cache_size()
    values, _ = registry.pack24(x, axis=1, mode="value", scale=scale)
    assert registry.traced_once(reference.pack24, ("axis", "mode"))._cache_size() == traces
    expected, _ = reference.pack24(x, axis=1, mode="value", scale=0.5)
    np.testing.assert_array_equal(np.asarray(values, np.float32), np.asarray(expected, np.float32))
