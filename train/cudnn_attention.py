"""cuDNN's attention where XLA is asked for deterministic operations.

XLA finds a compiled cuDNN graph by the fingerprint of its call. Asked for determinism, it writes
`force_deterministic` into the configuration of a backward call, but only when it compiles the
graph: of equal calls (unrolled layers, several micro-batches) the first one alone has it, and those
after it look for a graph that no one compiled, which ends the process (`std::out_of_range`, seen
with JAX 0.11.2 on two GPUs; pull request 46500 of openxla/xla). Calls that say it from the start
keep their fingerprint.
"""

from __future__ import annotations

import functools
import json
import os

_FLAGS = ("--xla_gpu_exclude_nondeterministic_ops", "--xla_gpu_deterministic_ops")


def requires_determinism() -> bool:
    """Whether XLA_FLAGS ask for deterministic operations: the last mention of a flag counts, and
    one without a value is true.

    XLA reads them once, when the first device is used: what is changed later deceives this. Flags
    in a file that XLA_FLAGS names are not looked for.
    """
    said = {}
    for flag in os.environ.get("XLA_FLAGS", "").split():
        name, _, value = flag.partition("=")
        said[name] = value.strip("\"'").lower() in ("", "true", "1")
    return any(said.get(name, False) for name in _FLAGS)


@functools.cache
def announce_determinism() -> None:
    """From here on, JAX's cuDNN attention says in its backward calls whether determinism is
    required. JAX has no option for it, so its function that writes the configuration is wrapped."""
    from jax._src.cudnn import fused_attention_stablehlo as calls

    write = calls.create_dot_product_attention_backend_config

    @functools.wraps(write)
    def write_with_determinism(*args, **kwargs) -> str:
        text = write(*args, **kwargs)
        if not requires_determinism():
            return text
        config = json.loads(text)
        attention = config["cudnn_fmha_backend_config"]
        if "bmm1_grad_gemm1_dot_dimension_numbers" in attention:  # Only backward calls have it.
            attention["force_deterministic"] = True
        return json.dumps(config)

    calls.create_dot_product_attention_backend_config = write_with_determinism
