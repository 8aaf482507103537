"""The harness itself, offline, on tasks written here, against probabilities computed one by one."""

import json
import os
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from tests.train.run_helpers import full_logits, write_run
from train.data.config import DataConfig
from train.huggingface.tokenizer_files import byte_tokenizer
from train.lm_eval.__main__ import main
from train.trained import load_run

pytest.importorskip("lm_eval", reason="needs the extra eval (lm-eval)")

TEXTS = [
    ("The sun", " is warm", " zqx"),
    ("A whole number", " is", " plus one is a number again"),
    ("Short", ".", "!"),
    ("Cold " * 9, "water", "fire"),
    ("", "beginning", "end"),
]
LONG = "One sentence that is longer than the positions the model was trained on. " * 3


@pytest.fixture(autouse=True, scope="module")
def _no_environment_report():
    """The harness asks PyTorch, where there is one, for seconds of facts about this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_run(folder, step=9, sparse=True)
    return folder


@pytest.fixture(name="run", scope="module")
def _run(folder):
    return load_run(folder)


class Oracle:
    """Log-probabilities in float64, a sequence at a time, without padding of any use."""

    def __init__(self, run, view="dense"):
        self.run = run
        packed = run.model.pack() if view == "sparse" else None
        self.forward = jax.jit(lambda ids: full_logits(run, ids, packed))

    def logits(self, ids):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(self.forward(padded), np.float64)[0, : len(ids)]

    def score(self, context, continuation):
        """(log-probability of the continuation's bytes, whether greedy decoding gives them).

        The harness counts spaces at the end of a context to what is scored.
        """
        words = context.rstrip()
        context, continuation = words, context[len(words) :] + continuation
        before = list(context.encode()) or [256]
        after = list(continuation.encode())
        return self.score_ids((before + after)[-65:], len(after))

    def score_ids(self, ids, count):
        logits = self.logits(ids[:-1])[-count:]
        own = logits[np.arange(count), ids[-count:]]
        top = logits.max(-1, keepdims=True)
        logs = own - top[:, 0] - np.log(np.exp(logits - top).sum(-1))
        return logs.sum(), bool(np.all(logits.argmax(-1) == ids[-count:]))

    def rolling(self, text):
        """Windows of 64 positions: whole ones first, the last one with all the context it can."""
        ids = [256, *text.encode()]
        total = 0.0
        for start in range(1, len(ids), 64):
            stop = min(start + 64, len(ids))
            total += self.score_ids(ids[max(0, stop - 65) : stop], stop - start)[0]
        return total

    def greedy(self, context, count):
        ids = list(context.encode())[-(64 - count) :]
        for _ in range(count):
            ids.append(int(self.logits(ids)[-1, :257].argmax()))
            if ids[-1] == 256:
                return self.run.tokenizer.decode(ids[-(_ + 1) :])
        return self.run.tokenizer.decode(ids[-count:])


@pytest.fixture(name="oracle", scope="module")
def _oracle(run):
    return Oracle(run)


@pytest.fixture(name="tasks", scope="module")
def _tasks(tmp_path_factory, oracle):
    """(folder of tasks, documents, stop string of "generate", whose answers are right for every
    other document)."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"question": q, "choices": [a, b], "label": i % 2, "text": LONG[: 40 * i + 1]}
        for i, (q, a, b) in enumerate(TEXTS)
    ]
    for i, document in enumerate(documents):
        document["prompt"] = (document["question"] or "x") + LONG * (i == 1)
    made = [oracle.greedy(document["prompt"], 20) for document in documents]
    stop = next(c for c in made[0][3:] + made[1] + made[2] if c.isascii() and c.isprintable())
    for i, document in enumerate(documents):
        document["answer"] = made[i].split(stop)[0] if i % 2 == 0 else "no such answer"
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in documents), encoding="utf-8")
    for name, kind in (
        ("choose", 'output_type: multiple_choice\ndoc_to_text: "{{question}}"\n'
                   'doc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
                   "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"),
        ("last_word", 'output_type: loglikelihood\ndoc_to_text: "{{question}}"\n'
                      'doc_to_target: "{{choices[0]}}"\n'
                      "metric_list:\n"
                      "  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"
                      "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"),
        ("roll", 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
                 "metric_list:\n  - metric: byte_perplexity\n"),
        ("generate", 'output_type: generate_until\ndoc_to_text: "{{prompt}}"\n'
                     'doc_to_target: "{{answer}}"\ntarget_delimiter: ""\n'
                     f"generation_kwargs: {{until: [{json.dumps(stop)}], max_gen_toks: 20}}\n"
                     "metric_list:\n"
                     "  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"),
    ):  # fmt: skip
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\ntarget_delimiter: ''\n"
            f"dataset_kwargs:\n  data_files: {{test: {data}}}\n  cache_dir: {folder / 'cache'}\n"
            + kind.replace('target_delimiter: ""\n', "")
        )
    return folder, documents, stop


def evaluate(folder, tasks, names, **arguments):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import train.lm_eval.model  # noqa: F401

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(
        model="sparsejax",
        model_args={"run": str(folder), **arguments},
        tasks=list(names),
        task_manager=manager,
        bootstrap_iters=0,
        batch_size=2,
    )


@pytest.fixture(name="results", scope="module")
def _results(folder, tasks):
    return evaluate(folder, tasks[0], ["choose", "last_word", "roll", "generate"])


def samples(results, name):
    return sorted(results["samples"][name], key=lambda sample: sample["doc_id"])


def test_multiple_choice(results, oracle, tasks):
    right = []
    for sample, document in zip(samples(results, "choose"), tasks[1], strict=True):
        want = [oracle.score(document["question"], choice) for choice in document["choices"]]
        got = sample["filtered_resps"]
        np.testing.assert_allclose([g[0] for g in got], [w[0] for w in want], rtol=1e-5)
        assert [bool(g[1]) for g in got] == [w[1] for w in want]
        right.append(int(np.argmax([w[0] for w in want])) == document["label"])
    assert results["results"]["choose"]["acc,none"] == np.mean(right)


def test_loglikelihood(results, oracle, tasks):
    want = [oracle.score(d["question"], d["choices"][0])[0] for d in tasks[1]]
    got = results["results"]["last_word"]["perplexity,none"]
    np.testing.assert_allclose(got, np.exp(-np.mean(want)), rtol=1e-5)


def test_rolling_loglikelihood_over_several_windows(results, oracle, tasks):
    texts = [d["text"] for d in tasks[1]]
    assert max(map(len, texts)) > 2 * 64
    total = sum(oracle.rolling(text) for text in texts)
    want = np.exp(-total / sum(len(text.encode()) for text in texts))
    np.testing.assert_allclose(results["results"]["roll"]["byte_perplexity,none"], want, rtol=1e-5)


def test_generation(results, oracle, tasks):
    _, documents, stop = tasks
    for sample, document in zip(samples(results, "generate"), documents, strict=True):
        want = oracle.greedy(document["prompt"], 20).split(stop)[0]
        assert sample["filtered_resps"] == [want]
    assert results["results"]["generate"]["exact_match,none"] == 0.6


def test_results_name_the_model(results):
    config = results["config"]
    assert (config["model"], config["model_step"], config["model_view"]) == (
        "sparsejax",
        9,
        "dense",
    )


def test_sparse_view(folder, run, tasks):
    oracle = Oracle(run, "sparse")
    results = evaluate(folder, tasks[0], ["choose"], view="sparse")
    for sample, document in zip(samples(results, "choose"), tasks[1], strict=True):
        want = [oracle.score(document["question"], choice)[0] for choice in document["choices"]]
        np.testing.assert_allclose([g[0] for g in sample["filtered_resps"]], want, rtol=1e-4)


def model(folder, **arguments):
    from train.lm_eval.model import SparseJaxLM

    return SparseJaxLM(str(folder), **arguments)


def test_few_programs_serve_many_lengths(folder):
    lm = model(folder, batch_size=4)
    shapes = set()
    score = lm._score
    lm.__dict__["_score"] = lambda tokens, targets: (
        shapes.add(tokens.shape) or score(tokens, targets)
    )
    pairs = [(None, [1] * n, [2] * (1 + n % 3)) for n in range(1, 80, 3)]
    assert len(lm._loglikelihood_tokens(pairs, disable_tqdm=True)) == len(pairs)
    assert shapes == {(4, 32), (4, 64)}


def test_the_order_of_requests_is_kept(folder, oracle):
    lm = model(folder)
    pairs = [(None, list(b"ab" * n), list(b"c")) for n in (3, 20, 1, 9)]
    got = lm._loglikelihood_tokens(pairs, disable_tqdm=True)
    want = [oracle.score("ab" * n, "c")[0] for n in (3, 20, 1, 9)]
    np.testing.assert_allclose([g[0] for g in got], want, rtol=1e-5)


def test_prefix_of_an_imported_model(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = DataConfig(tokenizer=str(tmp_path / "tokenizer.json"))
    write_run(tmp_path / "run", changes={"data": data})
    (tmp_path / "run" / "imported.json").write_text(json.dumps({"prefix": [257]}))
    lm = model(tmp_path / "run")
    assert lm.tok_encode("ab") == [257, 97, 98]
    assert lm.tok_encode("ab", add_special_tokens=False) == [97, 98]
    assert lm.prefix_token_id == 257
    assert lm.eot_token_id == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 65}, r"max_length=65 must be in \[1, 64\]"),
        ({"view": "thin"}, "view='thin'"),
        ({"step": 3}, "no checkpoint of step=3"),
    ],
)
def test_bad_arguments(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(folder, **arguments)


def test_bad_requests(folder):
    lm = model(folder)
    with pytest.raises(ValueError, match="65 tokens is longer than max_length=64"):
        lm._loglikelihood_tokens([(None, [1], [2] * 65)])
    with pytest.raises(ValueError, match="max_gen_toks=64 must be in"):
        lm._arguments({"max_gen_toks": 64})
    assert lm._arguments({})[1] == 32
    assert lm._arguments({"until": "x", "max_new_tokens": 3})[:2] == (["x"], 3)
    assert lm._arguments({"temperature": 0.7})[2].temperature == 0.7
    assert lm._arguments({"do_sample": False, "temperature": 0.7, "top_k": 5})[2].temperature == 0


def test_command_line(folder, tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", sys.argv)
    arguments = [
        "--model_args", f"run={folder}", "--tasks", "choose", "--include_path", str(tasks[0]),
        "--limit", "2", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "|choose|" in capsys.readouterr().out.replace(" ", "")
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["config"]["model"] == "sparsejax"


def test_the_harness_has_the_tasks_of_the_paper():
    """Those of the command in docs/evaluation.md; their data is not at hand here."""
    from lm_eval.tasks import TaskManager

    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    named = re.search(r"--tasks (arc_easy\S*)", page)[1].split(",")
    assert len(named) == 10
    assert set(named) <= set(TaskManager().all_tasks)


@pytest.mark.parametrize(
    ("given", "passed_on"),
    [
        (["--tasks", "a"], ["--model", "sparsejax", "--tasks", "a"]),
        (["run", "--tasks", "a"], ["run", "--model", "sparsejax", "--tasks", "a"]),
        (["--model", "hf", "--tasks", "a"], ["--model", "hf", "--tasks", "a"]),
        (["-M", "hf"], ["-M", "hf"]),
        (["ls", "tasks"], ["ls", "tasks"]),
    ],
)
def test_command_lines_for_the_harness(monkeypatch, capsys, given, passed_on):
    """What the harness is told; and its refusals become one line."""
    seen = []

    def harness():
        seen.extend(sys.argv)
        raise ValueError("run '/nowhere' has no folder checkpoints/")

    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", harness)
    assert main(given) == 2
    assert seen == ["lm_eval", *passed_on]
    assert capsys.readouterr().err == "error: run '/nowhere' has no folder checkpoints/\n"


def test_without_the_harness(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert main(["--tasks", "choose"]) == 2
    assert 'pip install -e ".[eval]"' in capsys.readouterr().err
