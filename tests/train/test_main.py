"""The command line as a user meets it: what it prints, and the exit codes."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from train import version_check
from train.main import main, parse

ROOT = Path(__file__).parents[2]


def refused(capsys, *argv):
    """The single line that a refused command line prints."""
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


@pytest.mark.core
def test_unknown_configuration(capsys):
    line = refused(capsys, "--config", "llama2b")
    assert re.fullmatch(r"error: config 'llama2b' is unknown; known: .*llama1b.*tiny.*\n", line)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.num-heads", "3"], "model.width=128 must be a multiple of model.num_heads=3"),
        (["--sparsity.m", "12"], "m=12 must be one of"),
        (["--steps", "100", "--schedule.warmup-steps", "60"], "exceed steps=100"),
        (["--data.source", "/nowhere/x.bin"], "/nowhere/x.bin"),
        (["--model.vocab-size", "100"], "smaller than the tokenizer's 257"),
        (["--mesh.fsdp", "7"], "mesh.fsdp=7"),
        (["--plot", "x.png"], "--plot x.png goes with --dry-run"),
    ],
)
def test_refused_before_anything_starts(capsys, tmp_path, argv, message):
    line = refused(capsys, *argv, "--output", str(tmp_path / "runs"))
    assert message in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there it runs")
def test_an_attention_kernel_that_the_device_lacks(capsys, tmp_path):
    argv = ["--model.attention", "cudnn", "--output", str(tmp_path / "runs")]
    argv += ["--steps", "2", "--schedule.warmup-steps", "0", "--optimizer.warmup-steps", "0"]
    assert main(argv) == 2
    assert "error: model.attention=cudnn needs a GPU" in capsys.readouterr().err
    assert not list((tmp_path / "runs").iterdir())  # a run that never began leaves nothing


def test_dry_run_refuses_what_a_run_refuses(capsys):
    assert "hidden=500" in refused(capsys, "--dry-run", "--model.hidden", "500")
    assert "needs data.tokenizer" in refused(capsys, "--dry-run", "--data.end-of-document", "</s>")


def test_resume_without_a_run(capsys, tmp_path):
    assert "nothing to resume" in refused(capsys, "--resume", "--output", str(tmp_path))


def test_overrides_are_typed_and_reach_every_level():
    arguments = parse(
        ["--config", "small", "--model.num-layers", "4", "--mesh.fsdp", "2", "--resume"]
    )
    assert (arguments.model.num_layers, arguments.mesh.fsdp, arguments.resume) == (4, 2, True)
    assert (arguments.name, arguments.model.width) == ("small", 512)
    assert parse(["--config=tiny"]).name == "tiny"


def test_wrong_type_exits_with_two():
    with pytest.raises(SystemExit) as caught:
        parse(["--model.num-layers", "four"])
    assert caught.value.code == 2


def test_field_out_of_range_exits_with_two(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--data.read-ahead", "0"])
    assert caught.value.code == 2
    assert "data.read_ahead=0 must be at least 1" in capsys.readouterr().err


def test_help_explains_every_field():
    command = [sys.executable, "-m", "train.main", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.stdout).split())
    for words in (
        "--model.num-layers INT",
        "Share of the whole run's steps that are sparse",
        "{none,dots,full}",
        "--dry-run",
        "--data.source",
        "Tokens that share a column choice",
    ):
        assert words in text, words


def test_old_jax_is_named_clearly(monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"JAX 0.9.0 is too old: sparsejax needs 0.10.2"):
        version_check.require_jax("0.9.0")
    version_check.require_jax("0.11.2")
    version_check.require_jax("0.12.0.1")
    version_check.require_jax("0.10.2.dev20260101")
    monkeypatch.setattr(version_check.importlib.metadata, "version", lambda _: "0.4.38")
    assert "JAX 0.4.38 is too old" in refused(capsys, "--config", "tiny")
