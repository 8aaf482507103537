"""The direction of imports: configs -> train -> sparsejax -> kernels."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["configs", "train", "sparsejax", "kernels"]


def imported_packages(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_to_the_right_only(package):
    left = set(ORDER[: ORDER.index(package)]) | {"tests", "benchmarks"}
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(f): bad for f in files if (bad := imported_packages(f) & left)}
    assert not wrong


def test_a_cpu_user_imports_no_gpu_backend():
    """Importing the library must not import Mosaic GPU or Triton: they cost time and may warn."""
    code = (
        "import sys, sparsejax, train.main, train.loop; "
        "bad = [m for m in sys.modules if m.startswith(('kernels.hopper', 'kernels.triton', "
        "'jax.experimental.pallas', 'jax.experimental.mosaic'))]; "
        "sys.exit(repr(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
