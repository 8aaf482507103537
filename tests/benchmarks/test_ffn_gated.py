"""The benchmark of gated networks: that it runs, compares and says what it ran."""

import json

import jax
import pytest

from benchmarks import ffn_gated
from benchmarks.ffn import PASSES


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the reference is no contender there")
def test_smoke_run(tmp_path, capsys):
    out = tmp_path / "ffn_gated.json"
    ffn_gated.main(["--out", str(out), "--smoke", "--blocks", "8"])
    result = json.loads(out.read_text())
    assert result["smoke"] is True
    assert result["failures"] == []
    (size,) = result["sizes"]
    assert (size["m"], size["hidden"]) == (8, 128)
    names = ("dense relu2_gated", "dense swiglu", "sparse, reference")
    by = {(r["contender"], r["passes"]): r for r in size["rows"]}
    assert set(by) == {(name, passes) for name in names for passes in PASSES}
    sparse = by["sparse, reference", "forward+backward"]
    assert set(sparse["speedup"]) == set(names[:2])
    # The same path, compiled twice.
    assert set(sparse["relative_errors"]) == set(ffn_gated.RESULTS)
    assert max(sparse["relative_errors"].values()) < 1e-3
    # One check a backend: its results hold the output of the forward pass too.
    assert by["sparse, reference", "forward"]["relative_errors"] is None
    assert "sparse, reference" in capsys.readouterr().out


def test_wrong_results_are_failures(monkeypatch, tmp_path):
    monkeypatch.setattr(ffn_gated, "TOLERANCE", -1.0)
    arguments = ["--out", str(tmp_path / "x.json"), "--smoke", "--blocks", "8"]
    with pytest.raises(SystemExit, match="relative errors"):
        ffn_gated.main(arguments)


@pytest.mark.parametrize(("width", "m", "hidden"), [(2048, 16, 5632), (4096, 32, 11264)])
def test_sizes_that_kernels_serve(width, m, hidden):
    assert ffn_gated.neurons(width, m, smoke=False) == hidden
    assert hidden // (m // 4) % 128 == 0
