"""The pages: their Python runs, their links lead somewhere, their commands and options exist."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import configs
from tests.train.run_helpers import write_run
from train import main
from train.config import resolve

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Their Python needs transformers, a data set from the network, or continues code that is not shown.
# What it calls has tests of its own.
OTHERS = {"evaluation.md", "fp8_and_experts.md", "huggingface.md"}

ids = lambda path: path.name


def blocks(path, language):
    """The fenced blocks of a page that name this language ("" for none), without the fences."""
    found, inside, lines = [], None, []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if inside == language:
                found.append("\n".join(lines))
            inside, lines = (None, []) if inside is not None else (line[3:].strip(), [])
        elif inside is not None:
            lines.append(line)
    return found


def python_of(path):
    return "\n".join(blocks(path, "python"))


WITH_PYTHON = [path for path in PAGES if python_of(path) and path.name not in OTHERS]


@pytest.mark.parametrize("path", WITH_PYTHON, ids=ids)
def test_the_python_of_a_page_runs_from_top_to_bottom(path, tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("images"))
    monkeypatch.chdir(tmp_path)
    code = python_of(path)
    names = {}
    exec(compile(code, path.name, "exec"), names)
    # "print(x)   # (32, 512) 0.5625" says what it prints; a sentence is no such promise.
    said = capsys.readouterr().out
    for promised in re.findall(r"^print\(.*\)\s+# ([-(\d].*)$", code, re.MULTILINE):
        assert promised in said
    if "config" in names:  # a configuration, as a file of configs/ defines it
        resolve(names["config"](), tokenizer_vocab_size=257)


def test_generation_from_python_runs(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "runs" / "tiny")
    monkeypatch.chdir(tmp_path)
    first, *_ = blocks(ROOT / "docs" / "evaluation.md", "python")
    exec(compile(first, "evaluation.md", "exec"), {})
    assert capsys.readouterr().out


def anchor(heading):
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, section = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if section:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in map(anchor, headings), target


def test_every_page_is_in_the_list_of_pages():
    listed = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text()))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


def command_lines():
    """Arguments of every `python -m train.main` in a page's blocks, but for placeholders."""
    for path in PAGES:
        for block in blocks(path, "bash") + blocks(path, ""):
            for line in block.replace("\\\n", " ").splitlines():
                _, found, rest = line.partition("python -m train.main ")
                arguments = shlex.split(rest, comments=True)
                if found and not {"NAME", "...", "--help"} & set(arguments):
                    yield pytest.param(arguments, id=f"{path.name}: {shlex.join(arguments)}"[:80])


@pytest.mark.parametrize("arguments", list(command_lines()))
def test_command_lines_of_the_trainer_parse(arguments, monkeypatch):
    tiny = configs.get("tiny")
    known = configs.get
    # The page's own configuration stands for any.
    monkeypatch.setattr(configs, "get", lambda name: tiny if name == "mine" else known(name))
    parsed = main.parse(arguments)
    assert parsed.config == (arguments[arguments.index("--config") + 1])


def test_paths_in_pages_exist():
    """Files and modules that a page names in code, in the folders whose names are ours."""
    for path in (page for page in PAGES if page.name != "comparison.md"):  # names other projects'
        text = path.read_text(encoding="utf-8")
        for name in re.findall(
            r"`((?:kernels|sparsejax|train|configs|benchmarks|tests|docs|examples)/[\w/.]*)`", text
        ):
            if name != "configs/mine.py":
                assert (ROOT / name).exists(), f"{path.name}: {name}"
        for name in re.findall(r"python -m ((?:train|benchmarks|tests|kernels)[\w.]*)", text):
            base = ROOT / name.rstrip(".").replace(".", "/")
            assert base.with_suffix(".py").exists() or (base / "__main__.py").exists(), name


def test_the_api_reference_can_be_built(tmp_path):
    """By the quickstart's own command; a page for each module, from its docstrings."""
    pytest.importorskip("pdoc", reason="needs the extra dev (pdoc)")
    [block] = [b for b in blocks(ROOT / "docs" / "quickstart.md", "bash") if "pdoc" in b]
    [line] = [line for line in block.replace("\\\n", " ").splitlines() if "-m pdoc" in line]
    _, *arguments, output = shlex.split(line)
    done = subprocess.run(
        [sys.executable, *arguments, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert output == "build/api"
    modules = [a for a in arguments if a.startswith(("sparsejax", "kernels", "train"))]
    assert len(modules) > 10
    for module in modules:
        page = (tmp_path / f"{module.replace('.', '/')}.html").read_text(encoding="utf-8")
        assert 'class="docstring"' in page
    page = (tmp_path / "sparsejax" / "nn.html").read_text(encoding="utf-8")
    for word in ("Linear24", "RoutedFFN", "MoEFFN", "ValueError"):
        assert word in page
