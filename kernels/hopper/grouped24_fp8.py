"""The routed FFN's 8-bit products on Hopper (definitions: `kernels.reference_grouped_fp8`)."""

from kernels.hopper.grouped_common import GroupedConfig
from kernels.hopper.grouped_down_fp8 import check_down24_fp8, down24_fp8
from kernels.hopper.grouped_neurons import row_order
from kernels.hopper.grouped_pack_fp8 import check_pack_weight24_fp8, pack_weight24_fp8
from kernels.hopper.grouped_up_backward_fp8 import check_up24_backward_fp8, up24_backward_fp8
from kernels.hopper.grouped_up_fp8 import check_up24_fp8, up24_fp8
from kernels.hopper.stack_fp8 import check_stack_fp8, stack_fp8

__all__ = [
    "GroupedConfig",
    "check_down24_fp8",
    "check_pack_weight24_fp8",
    "check_stack_fp8",
    "check_up24_backward_fp8",
    "check_up24_fp8",
    "down24_fp8",
    "pack_weight24_fp8",
    "row_order",
    "stack_fp8",
    "up24_backward_fp8",
    "up24_fp8",
]
