"""The train step benchmark: that it runs, adds up, reads options and derives its figures."""

import json
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import train_step, train_step_breakdown, train_step_report
from benchmarks.train_step_programs import Spec
from train import scopes
from train.study.equal_time import read_speedups

SMALL = shlex.split(
    "--batch-size 2 --sequence-length 64 --model.width 32 --model.num-layers 1 "
    "--model.num-heads 2 --model.loss-chunk 128 --sparsity.m 8 --sparsity.v 64"
)


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the default backend times for real")
def test_smoke_run(tmp_path, capsys):
    out = tmp_path / "results" / "step.json"
    few = shlex.split("--warmup-steps 3 --rounds 2 --round-steps 2 --settle-steps 1")
    train_step.main(["--config", "tiny", "--out", str(out), "--smoke", *few, *SMALL])
    result = json.loads(out.read_text())
    assert (result["complete"], result["failures"], result["smoke"]) == (True, [], True)
    assert "a smoke test, its times say nothing about speed" in capsys.readouterr().out
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    (group,) = result["groups"]
    dense, sparse = group["rows"]
    assert [row["phase"] for row in (dense, sparse)] == ["dense", "sparse"]
    assert sparse["m"] == 8
    for row in (dense, sparse):
        assert row["seconds"] == pytest.approx(np.median(row["rounds_seconds"]))
        assert row["tokens_per_second"] == pytest.approx(2 * 64 / row["seconds"])
        assert row["timed_steps"] == 4
        parts = row["breakdown"]["parts"]
        # Every part that a step is made of was found in the profile.
        named = {part for part, seconds in parts.items() if seconds > 0}
        assert set(scopes.ALL) - named <= {scopes.ROPE}  # fused into its neighbours
        assert sum(train_step_report.parts(row).values()) == pytest.approx(row["seconds"])
        assert row["memory"]["total"] > row["memory"]["temporaries"] > 0
    assert sparse["speedup"] == pytest.approx(dense["seconds"] / sparse["seconds"])
    assert read_speedups(out).of("M8") == pytest.approx(sparse["speedup"])
    assert group["clustering"]["refresh_seconds"] > 0
    assert result["training"]["last_loss"] < result["training"]["first_loss"]


def test_parts_of_a_compiled_step():
    def loss(w, x):
        with jax.named_scope(scopes.FFN):
            y = jnp.tanh(x @ w)
        with jax.named_scope(scopes.HEAD):
            return jnp.sum(jnp.sin(y @ w.T))

    arrays = jnp.ones((8, 8)), jnp.ones((4, 8))
    text = jax.jit(jax.grad(loss)).lower(*arrays).compile().as_text()
    found = train_step_breakdown.instructions(text)
    assert {i.scope for i in found.values()} >= {scopes.FFN, scopes.HEAD}


def test_fusions_without_a_name_count_where_most_of_their_body_does():
    text = """
%body (p: f32[4]) -> (f32[4], f32[4]) {
  %p = f32[4]{0} parameter(0)
  %a = f32[4]{0} sine(%p), metadata={op_name="jit(step)/optimizer/sin"}
  %b = f32[4]{0} cosine(%p), metadata={op_name="jit(step)/optimizer/cos"}
  %c = f32[4]{0} add(%a, %b), metadata={op_name="jit(step)/transpose(jvp(ffn))/add"}
  ROOT %t = (f32[4]{0}, f32[4]{0}) tuple(%a, %c)
}

ENTRY %main (x: f32[4]) -> (f32[4], f32[4]) {
  %x = f32[4]{0} parameter(0)
  ROOT %fusion.1 = (f32[4]{0}, f32[4]{0}) fusion(%x), kind=kLoop, calls=%body
}
"""
    found = train_step_breakdown.instructions(text)
    assert found["fusion.1"].scope == scopes.OPTIMIZER
    assert found["c"].scope == scopes.FFN
    assert found["x"].scope is None


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("jit(step)/transpose(jvp(ffn))/dot_general", scopes.FFN),
        ("jit(step)/head/while/body/norm/mul", scopes.NORM),
        ("jit(step)/ffn_other/mul", None),
    ],
)
def test_scope_of(name, scope):
    assert train_step_breakdown.scope_of(name) == scope


def _row(phase, seconds, tokens, ffn):
    parts = {scope: 0.0 for scope in scopes.ALL} | {scopes.FFN: ffn}
    rate = tokens / seconds
    return {"phase": phase, "seconds": seconds, "tokens": tokens, "tokens_per_second": rate,
            "settings": "", "breakdown": {"parts": parts}}  # fmt: skip


def test_bars_say_what_they_are(tmp_path):
    """A dense step beside a sparse one has none of its options, and a profile without kernels is no
    profile."""
    dense, sparse = _row("dense", 1.0, 100, 0.5), _row("sparse", 0.5, 100, 0.0)
    dense["speedup"], sparse["speedup"] = 1.0, 2.0
    group = {"name": "M=16 --model.ffn-precision fp8", "rows": [dense, sparse]}
    result = {"groups": [group], "settings": {"config": "tiny"}, "device": {"kind": "cpu"}}
    label = lambda row: " ".join(train_step_report._label(result, group["name"], row).split())
    assert label(dense) == "dense beside M=16 model. ffn- precision fp8"
    assert label(sparse) == "sparse M=16 model. ffn- precision fp8"
    assert train_step_report.parts(dense)["FFN"] == 0.5
    assert train_step_report.parts(sparse) is None
    train_step_report.plot(result | {"smoke": True, "complete": True}, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000


def test_bound_and_whole_run():
    # Half of a dense step is FFN; the sparse step has twice the tokens in 1.2 times the time, of
    # which the FFN takes 0.4: by token it is 2.5 times as fast.
    dense, sparse = _row("dense", 1.0, 100, 0.5), _row("sparse", 1.2, 200, 0.4)
    dense["speedup"], sparse["speedup"] = 1.0, (200 / 1.2) / 100
    found = train_step_report.amdahl_row(dense, sparse)
    assert found["ffn_share"] == pytest.approx(0.5)
    assert found["ffn_speedup"] == pytest.approx(2.5)
    assert found["bound"] == pytest.approx(1 / (0.5 + 0.5 / 2.5))
    assert found["share_of_bound"] == pytest.approx(sparse["speedup"] / found["bound"])

    run = {"steps": 10, "sparse_steps": 4, "refreshes": 3, "tokens_per_step": 1000}
    clustering = {"begin_seconds": 2.0, "refresh_seconds": 1.0}
    whole = train_step_report.whole_run(run, dense, sparse, clustering)
    assert whole["seconds_dense"] == pytest.approx(100.0)
    assert whole["seconds_recipe"] == pytest.approx(6 * 10 + 4 * 6 + 2 + 3)
    assert whole["speedup"] == pytest.approx(100 / 89)


def test_compiler_options_are_told_from_the_trainers():
    spec = Spec.parse("dense", "--model.remat full --xla xla_gpu_x=true --batch-size 4")
    assert spec.arguments == ("--model.remat", "full", "--batch-size", "4")
    assert spec.compiler_options["xla_gpu_x"] is True
    with pytest.raises(ValueError, match="must be NAME=VALUE"):
        _ = Spec.parse("dense", "--xla nonsense").compiler_options


@pytest.mark.parametrize(
    "arguments", [["--rounds", "0"], ["--depths", "1", "2"], ["--no-sparse", "--m", "8"]]
)
def test_bad_options_are_refused(arguments, tmp_path, capsys):
    out = ["--out", str(tmp_path / "x.json"), "--config", "tiny", "--smoke"]
    with pytest.raises(SystemExit):
        train_step.main([*out, *arguments])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("python -m benchmarks.train_step: error: --")


def test_a_row_may_be_a_single_option():
    arguments = shlex.split(
        "--config tiny --out x --row-sparse --sparsity.attention-projections --sparsity.m 8 "
        "--row-dense '--model.ffn-precision fp8'"
    )
    _, options, rest = train_step.parse(arguments)
    assert rest == ["--sparsity.m", "8"]
    dense, sparse = train_step.settings_of(options, rest).rows
    assert dense.overrides == ("--model.ffn-precision", "fp8")
    assert sparse.overrides == ("--sparsity.attention-projections",)
