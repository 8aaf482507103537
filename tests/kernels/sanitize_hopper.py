"""Small runs of the Hopper kernels, to watch with NVIDIA's checkers:

    compute-sanitizer --tool memcheck python -m tests.kernels.sanitize_hopper
    compute-sanitizer --tool racecheck python -m tests.kernels.sanitize_hopper

Operands are made with numpy, so that the kernels are nearly all that runs on the device.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels.hopper.pack24 import pack24
from kernels.hopper.spmm24 import Spmm24Config, spmm24

WIDE = Spmm24Config(wg_m=2, tile_n=192, epi_n=192, out_slots=1)


def main() -> None:
    rng = np.random.default_rng(0)
    x = jax.device_put(rng.standard_normal((320, 320), np.float32))
    y = jax.device_put(rng.standard_normal((320, 392), np.float32).astype(jnp.bfloat16))
    for axis in (0, 1):
        values, metadata = pack24(x, axis=axis, mode="soft_threshold")
        for out_layout in ("mn", "nm"):
            for config in (WIDE, Spmm24Config(cluster="m")):
                out = spmm24(
                    values, metadata, y, b_layout="kn", out_layout=out_layout, config=config
                )
                assert np.isfinite(np.asarray(out, np.float32)).all()
    print("done")


if __name__ == "__main__":
    main()
