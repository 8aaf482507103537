"""The search of tiles without a GPU: every candidate is allowed, every kernel takes one, and what
cannot be searched here says so."""

import jax
import pytest

from benchmarks import tune, tune_grouped
from benchmarks.ffn_problem import operand_shapes
from benchmarks.ffn_stages import Stages
from kernels.triton.grouped_dw import _check_config
from kernels.triton.grouped_neurons import check_tile
from kernels.triton.spmm24 import check_config
from sparsejax.spec import Sparsity
from tests.kernels.test_triton import an_h100


def test_candidates_are_allowed():
    for config in tune_grouped.SPARSE:
        check_config(config)
        check_tile(config)
    for config in tune_grouped.DENSE:
        _check_config(config)
    for candidates in (tune_grouped.SPARSE, tune_grouped.DENSE):
        assert len(set(candidates)) == len(candidates)


@pytest.mark.parametrize("op", ["up24", "down24", "up24_backward", "weight_gradient"])
def test_kernels_take_a_candidate(op):
    sparsity = Sparsity(m=16, v=128, backend="triton")
    with an_h100():
        arguments = Stages(sparsity, "triton").arguments(operand_shapes(256, 2048, 1024, 4))
        function, own = tune_grouped.calls(4, arguments)[op]
        config = (tune_grouped.DENSE if op == "weight_gradient" else tune_grouped.SPARSE)[-1]
        traced = jax.jit(lambda *a: function(config, *a)).trace(*own)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "xla.gpu.triton" in text


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is something to search on a GPU")
@pytest.mark.parametrize("search", [tune, tune_grouped])
def test_without_a_gpu_it_is_refused(search, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune"])
    with pytest.raises(SystemExit) as left:
        search.main()
    assert left.value.code == 2
    assert "the device is no NVIDIA GPU" in capsys.readouterr().err
