"""The benchmark of mixtures: that it runs, compares and says what it ran."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import moe
from benchmarks.failures import Failures


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the reference is no contender there")
def test_smoke_run(tmp_path, capsys):
    out = tmp_path / "moe.json"
    moe.main(["--out", str(out), "--smoke", "--clusters", "2"])
    result = json.loads(out.read_text())
    assert result["smoke"] is True
    assert result["failures"] == []
    found = {(r["contender"], r["passes"]) for r in result["rows"]}
    further = ("sparse S=2, reference",)
    names = ("dense, xla", "sparse, reference", *further, "one network")
    assert found == {(name, passes) for name in names for passes in moe.PASSES}
    by = {(r["contender"], r["passes"]): r["ms"] for r in result["rows"]}
    for passes in moe.PASSES:
        over = result["speedup"][f"sparse, reference, {passes}"]["dense, xla"]
        ratio = by["dense, xla", passes] / by["sparse, reference", passes]
        assert over == pytest.approx(ratio)
        assert set(further) <= set(result["speedup"][f"sparse, reference, {passes}"])
    assert result["packing_ms"]["sparse, reference"] > 0
    assert "4 experts, top-2" in capsys.readouterr().out


def test_even_loads_and_wrong_results():
    x = jax.random.normal(jax.random.key(0), (moe.SMOKE.tokens, moe.SMOKE.width), jnp.bfloat16)
    state = moe.evened(moe.SMOKE, x)
    found = moe.candidates(moe.SMOKE, state, ("reference",), x, (1, 2))
    for name, groups in (("sparse, reference", 4), ("sparse S=2, reference", 8)):
        graph, own, packed = found[name]
        counts = np.asarray(moe.nnx.merge(graph, own)(x, packed)[1].counts)
        assert counts.shape == (groups,)
        assert counts.sum() == 2 * moe.SMOKE.tokens
        assert counts.max() < 1.3 * counts.mean()
    failures = Failures()
    moe._compare({"dense, a": x, "dense, b": x, "sparse, a": x}, failures, "forward")
    assert not failures
    moe._compare({"dense, a": x, "dense, b": x * 1.1, "sparse, a": x * 2}, failures, "forward")
    assert len(failures) == 1
    moe._compare({"sparse, a": x, "sparse, b": x * jnp.nan}, failures, "forward")
    assert len(failures) == 2
    moe._compare({"sparse S=2, a": x, "sparse, b": x * 2}, failures, "forward")
    assert len(failures) == 2


@pytest.mark.parametrize("clusters", ["1", "3", "8"])
def test_clusters_that_cannot_be(clusters, tmp_path, capsys):
    with pytest.raises(SystemExit):
        moe.main(["--out", str(tmp_path / "moe.json"), "--smoke", "--clusters", clusters])
    assert f"--clusters {clusters}:" in capsys.readouterr().err
