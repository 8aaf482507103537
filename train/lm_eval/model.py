"""The harness's view of a trained run; importing this registers it as "sparsejax"."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import jax
from flax import nnx
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from train.generate.decoder import Decoder
from train.generate.sampling import Sampling
from train.lm_eval.scoring import Scorer, make_scorer, score_continuations
from train.trained import View, check_view, load_run

log = logging.getLogger(__name__)

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_GENERATED = 256


@register_model("sparsejax")
class SparseJaxLM(TemplateLM):
    """A run in this process: scores and generates with the trainer's own forward pass.

    One device. Contexts that do not fit are cut from the left, as the harness's own models do.
    """

    def __init__(
        self,
        run: str,
        *,
        step: int | None = None,
        view: str = "dense",
        batch_size: int | str = 8,
        max_length: int | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """Loads the run's model. The arguments are what `--model_args run=...,view=...` names.

        Args:
          run: the run's folder.
          step: of the checkpoint; None for the newest.
          view: "dense" or "sparse".
          batch_size: rows of a batch; "auto" is 8.
          max_length: positions to use, up to those that the model was trained on (the default).
          seed: of sampled generation.
          max_batch_size: of the harness's search for a batch size; not used.
          device: what the harness passes to PyTorch; not used, JAX chooses (see JAX_PLATFORMS).

        Raises:
          ValueError: one line naming the value.
        """
        super().__init__()
        del max_batch_size, device
        rows = 8 if str(batch_size).startswith("auto") else int(batch_size)
        if rows < 1:
            raise ValueError(f"{batch_size=} must be at least 1")
        self.batch_size = rows
        self.run = load_run(run, step=step)
        trained = self.run.config.sequence_length
        self.max_length = trained if max_length is None else int(max_length)
        if not 1 <= self.max_length <= trained:
            raise ValueError(f"{max_length=} must be in [1, {trained}], the positions trained on")
        self.view = cast(View, view)
        self.seed = seed
        check_view(self.run, view)
        self._warned: set[str] = set()

    # Made on first use: each has its own copy of the weights, and tasks seldom need both.
    @cached_property
    def _score(self) -> Scorer:
        return make_scorer(self.run, view=self.view)

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.run, view=self.view)

    @property
    def eot_token_id(self) -> int:
        return self.run.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context becomes: the token that documents begin after."""
        return self.run.prefix[-1] if self.run.prefix else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.run.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results."""
        sizes = (leaf.size for leaf in jax.tree.leaves(nnx.state(self.run.model, nnx.Param)))
        return {
            "model_num_parameters": sum(sizes),
            "model_step": self.run.step,
            "model_view": self.view,
            "model_run": str(self.run.folder),
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text, behind the run's prefix (empty for a model trained here) unless
        `add_special_tokens` is False."""
        prefix = () if add_special_tokens is False else self.run.prefix
        return [*prefix, *self.run.tokenizer.encode(string).tolist()]

    def tok_decode(self, tokens: Sequence[int] | int, **kwargs: Any) -> str:
        return self.run.tokenizer.decode([tokens] if isinstance(tokens, int) else list(tokens))

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        scored = score_continuations(
            self._score,
            [(context, continuation) for _, context, continuation in requests],
            batch_size=self.batch_size,
            max_length=self.max_length,
        )
        bar = tqdm(
            scored, total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests"
        )
        for i, total, greedy in bar:
            results[i] = total, greedy
            text = requests[i][0]
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, results[i])
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of max_length that each predict new tokens."""
        windows: list[tuple[tuple[str, str] | None, list[int], list[int]]] = []
        owner: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            pieces = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for piece in pieces:
                windows.append((None, *utils.make_disjoint_window(piece)))
                owner.append(i)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for i, (total, _) in zip(owner, scores, strict=True):
            totals[i] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut before the first stop string or the end of the document.

        Of the harness's generation arguments: until, max_gen_toks (and its other names), do_sample,
        temperature, top_k, top_p. Others are named in a warning and have no effect.
        """
        results = [""] * len(requests)
        prepared = []
        for i, request in enumerate(requests):
            context, arguments = request.args
            until, most, sampling = self._arguments(dict(arguments))
            ids = self.tok_encode(context) or [self.prefix_token_id]
            prepared.append((most, sampling, -len(ids), i, until, ids[-(self.max_length - most) :]))
        # Rows of a batch share length limit and sampling; each keeps its own stop strings.
        prepared.sort(key=lambda p: (p[0], p[1].temperature, p[1].top_k, p[1].top_p, p[2], p[3]))
        bar = tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running generate_until requests"
        )
        while prepared:
            most, sampling = prepared[0][:2]
            batch = [p for p in prepared[: self.batch_size] if p[:2] == (most, sampling)]
            prepared = prepared[len(batch) :]
            untils = [p[4] for p in batch]

            def stopped(row: int, ids: list[int], untils: list[list[str]] = untils) -> bool:
                text = self.tok_decode(ids)
                return any(stop in text for stop in untils[row])

            made = self._decoder(
                [p[5] for p in batch],
                max_tokens=most,
                sampling=sampling,
                # A row's draws depend on its place in the batch; batches must not repeat them.
                seed=self.seed + batch[0][3],
                stop=stopped,
            )
            for (*_, i, until, _), ids in zip(batch, made, strict=True):
                text = self.tok_decode(ids)
                ends = [text.index(stop) for stop in until if stop in text]
                results[i] = text[: min(ends)] if ends else text
                self.cache_hook.add_partial("generate_until", requests[i].args, results[i])
                bar.update(1)
        bar.close()
        return results

    def _arguments(self, given: dict[str, Any]) -> tuple[list[str], int, Sampling]:
        """(stop strings, most tokens, sampling) of a request's generation arguments."""
        until = given.pop("until", None) or []
        until = [until] if isinstance(until, str) else [stop for stop in until if stop]
        lengths = [given.pop(name, None) for name in _LENGTH_NAMES]
        most = next(
            (int(value) for value in lengths if value is not None),
            min(_DEFAULT_GENERATED, self.max_length // 2),
        )
        if not 1 <= most < self.max_length:
            raise ValueError(f"max_gen_toks={most} must be in [1, max_length={self.max_length})")
        temperature = given.pop("temperature", None)
        do_sample = given.pop("do_sample", None)
        if do_sample is None:
            do_sample = bool(temperature)
        if not do_sample:
            temperature = 0.0
        sampling = Sampling(
            temperature=1.0 if temperature is None else float(temperature),
            top_k=int(given.pop("top_k", None) or 0),
            top_p=float(given.pop("top_p", None) or 1.0),
        )
        if not sampling.temperature:
            sampling = Sampling()
        for name in sorted(given.keys() - self._warned):
            log.warning("generation argument %s=%r has no effect here", name, given[name])
            self._warned.add(name)
        return until, most, sampling
