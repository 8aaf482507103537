"""The grouped products of the routed FFN on Hopper (definitions: `kernels.reference_grouped`)."""

from kernels.hopper.grouped_common import PART as NEURONS
from kernels.hopper.grouped_common import GroupedConfig
from kernels.hopper.grouped_down import check_down24, down24
from kernels.hopper.grouped_dw24 import check_weight_gradient24, weight_gradient24
from kernels.hopper.grouped_dw_shared import (
    check_weight_gradient,
    serves_shared,
    weight_gradient,
)
from kernels.hopper.grouped_neurons import row_order
from kernels.hopper.grouped_pack import check_pack_weight24, pack_weight24
from kernels.hopper.grouped_up import check_up24, up24, up24_linear
from kernels.hopper.grouped_up_backward import check_up24_backward, up24_backward

# Whether the products take several shards at once (`kernels.reference_grouped`).
SHARDS = True
# Whether they take weights that are not 2:4.
DENSE_WEIGHTS = True
# Whether they, packing and weight gradients take shared neurons once.
SHARED_ONCE = True

__all__ = [
    "DENSE_WEIGHTS",
    "NEURONS",
    "SHARDS",
    "SHARED_ONCE",
    "GroupedConfig",
    "check_down24",
    "check_pack_weight24",
    "check_up24",
    "check_up24_backward",
    "check_weight_gradient",
    "check_weight_gradient24",
    "down24",
    "pack_weight24",
    "row_order",
    "serves_shared",
    "up24",
    "up24_backward",
    "up24_linear",
    "weight_gradient",
    "weight_gradient24",
]
