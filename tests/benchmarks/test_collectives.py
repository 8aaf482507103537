"""Reading collectives out of HLO: groups, loops, what is sent."""

import dataclasses

import pytest

from benchmarks.collectives import (
    CARD_BANDWIDTH,
    NODE_BANDWIDTH,
    bandwidth,
    collectives,
    replica_group,
)

MODULE = """HloModule jit_step, is_scheduled=false

%add.1 (a: bf16[], b: bf16[]) -> bf16[] {
  ROOT %sum = bf16[] add(%a, %b)
}

%body.2 (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], bf16[8,16]{1,0}) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%p), index=1
  %whole = bf16[8,64]{1,0} all-gather(%x), replica_groups=[2,4]<=[2,4], dimensions={1}
  %unused = bf16[8,64]{1,0} all-gather(%x), replica_groups=[2,4]<=[2,4], dimensions={1}
  %sum.1 = bf16[8,64]{1,0} all-reduce(%whole), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add.1
  %mine = bf16[8,16]{1,0} dynamic-slice(%sum.1, %i, %j), dynamic_slice_sizes={8,16}
  %over = bf16[8,16]{1,0} all-reduce(%mine), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add.1
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%i, %over)
}

%condition.3 (p: (s32[], bf16[8,16])) -> pred[] {
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n = s32[] constant(25)
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main.4 (x: bf16[8,16]) -> bf16[8,16] {
  %loop = (s32[], bf16[8,16]{1,0}) while(%init), condition=%condition.3, body=%body.2
  %eight = f8e4m3fn[16,64]{1,0} all-gather(%e), replica_groups=[2,4]<=[8], dimensions={1}
  %used = f8e4m3fn[16,64]{1,0} copy(%eight)
  %part = f32[4,2]{1,0} reduce-scatter(%y), replica_groups=[2,4]<=[8], to_apply=%add.1
  ROOT %out = f32[4,2]{1,0} all-to-all(%part), replica_groups={{0,4},{1,5},{2,6},{3,7}}
}
"""


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=[4,2]<=[2,2,2]T(2,1,0)", [0, 4]),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2] {'a'}", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [0, 1, 4, 5]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [0, 4]),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", [0, 1, 2, 3]),
    ],
)
def test_replica_groups(text, group):
    assert replica_group(f"%x = f32[] all-reduce(%y), {text}, to_apply=%add") == group


def test_no_groups_is_an_error():
    with pytest.raises(ValueError, match="no replica groups"):
        replica_group("all-reduce(%y)")


def test_what_a_program_sends():
    found = collectives(MODULE, {"data": 2, "fsdp": 4})
    assert len(found) == 6
    eight = next(c for c in found if c.kind == "all-gather" and c.times == 1)
    assert (eight.axes, eight.size) == ("fsdp", 16 * 64)
    found.remove(eight)
    seen = {(c.kind, c.axes): (c.group, c.size, c.times, c.sent) for c in found}
    # 8 x 64 bf16 gathered in each of 25 rounds; the second gather has no user.
    assert seen["all-gather", "fsdp"] == (4, 1024, 25, 25 * 1024 * 3 / 4)
    # Of one all-reduce only a slice is used; the other is whole, and counts twice.
    in_loop = next(c for c in found if c.kind == "reduce-scatter" and c.times == 25)
    assert (in_loop.axes, in_loop.sent) == ("fsdp", 25 * 1024 * 3 / 4)
    assert seen["all-reduce", "data"] == (2, 256, 25, 25 * 2 * 256 / 2)
    assert seen["all-to-all", "data"] == (2, 32, 1, 16)


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="unknown number of times"):
        collectives(MODULE.replace("constant(25)", "parameter(1)"), {"data": 2, "fsdp": 4})


def test_bandwidths_follow_the_nodes():
    within, across = collectives(MODULE, {"data": 2, "fsdp": 4})[:2]
    assert bandwidth(within) == NODE_BANDWIDTH
    spread = dataclasses.replace(across, group=16, neighbours=2)
    assert bandwidth(spread) == 2 * CARD_BANDWIDTH
    assert bandwidth(dataclasses.replace(across, group=64, neighbours=8)) == 8 * CARD_BANDWIDTH
