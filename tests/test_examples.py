"""The notebooks run from top to bottom, and are committed with what they showed."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MISSING = [
    name for name in ("nbclient", "nbformat", "ipykernel") if not importlib.util.find_spec(name)
]

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f'{", ".join(MISSING)} missing: pip install -e ".[notebooks]"'
)


def read(path):
    import nbformat

    return nbformat.read(path, as_version=4)


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {"formats", "own_model", "training", "benchmark"}


@pytest.mark.slow
def _run_apart(path):
    """The notebook that trains for a while runs with the trainers that tests start."""
    marks = [pytest.mark.processes] if path.stem == "training" else []
    return pytest.param(path, marks=marks, id=path.stem)


@pytest.mark.parametrize("path", [_run_apart(path) for path in NOTEBOOKS])
def test_it_runs_from_top_to_bottom(path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = read(path)
    pictures = [len(images(cell)) for cell in notebook.cells]
    # As opened in a browser: the kernel starts in the notebook's folder.
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute()
    assert [len(images(cell)) for cell in notebook.cells] == pictures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_with_its_outputs_and_small(path):
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(len(images(cell)) for cell in code) >= 1
    text = path.read_text(encoding="utf-8")
    assert len(text) < 400_000
    # Nothing of the machine that it was run on, and no warnings of its kernel.
    for word in ("/home/", "/tmp/", "/root/", str(FOLDER.parent), "Traceback", "Warning"):
        assert word not in text
    for output in (output for cell in code for output in cell.outputs):
        assert output.get("name") != "stderr"


def images(cell):
    """PNG outputs of a cell."""
    return [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
