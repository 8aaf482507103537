"""The grouped products of the routed FFN through Pallas Triton, for sm_80 and later.

Definitions: `kernels.reference_grouped`. Four products run on sparse tensor cores (mma.sp), all in
the main loop of `spmm24`; the weight gradients are dense.
"""

from kernels.triton.grouped_common import NEURONS
from kernels.triton.grouped_down import check_down24, down24
from kernels.triton.grouped_dw import GradientConfig, check_weight_gradient, weight_gradient
from kernels.triton.grouped_neurons import row_order
from kernels.triton.grouped_pack import check_pack_weight24, pack_weight24
from kernels.triton.grouped_up import check_up24, up24, up24_linear
from kernels.triton.grouped_up_backward import check_up24_backward, up24_backward

# Whether the products take several shards at once (`kernels.reference_grouped`).
SHARDS = True
# Whether they take weights that are not 2:4.
DENSE_WEIGHTS = True
# Whether they, packing and weight gradients take shared neurons once.
SHARED_ONCE = False

__all__ = [
    "DENSE_WEIGHTS",
    "NEURONS",
    "SHARDS",
    "SHARED_ONCE",
    "GradientConfig",
    "check_down24",
    "check_pack_weight24",
    "check_up24",
    "check_up24_backward",
    "check_weight_gradient",
    "down24",
    "pack_weight24",
    "row_order",
    "up24",
    "up24_backward",
    "up24_linear",
    "weight_gradient",
]
