"""PTX of what a thread does with a group of four neurons of a token, for every backend with PTX.

Operands are numbered as in inline assembly, results first. DTYPE stands for bf16 or f16.
"""

# Keeps a group's two largest of relu(x)^2, x in $2 .. $5. $0 is the pair, rounded and packed in the
# order of the indices; $1 says how `prmt` on (pair, 0) spreads it to four neurons, with the
# selector of neurons 0 and 1 in the low half, of 2 and 3 in the high half. Which zero byte a
# selector takes is free, and chosen such that bits 0-1 are the lower and bits 28-29 the higher kept
# index.
#
# relu^2 keeps the order of positive numbers, so x itself is compared, ties to the lower index;
# where fewer than two are positive, others complete the pair, as zeros. x |x| is the square, and
# the conversion clamps it. Predicated products instead of selections, because comparisons, minima,
# logic and selections share a unit of half the rate, which bounds this epilogue. A NaN stays.
CHOOSE = """{ .reg .pred second, fourth, front, back;
.reg .f32 top0, bottom0, top1, bottom1, m, low, high;
setp.gt.f32 second, $3, $2;
setp.gt.f32 fourth, $5, $4;
max.NaN.f32 top0, $2, $3;
min.NaN.f32 bottom0, $2, $3;
max.NaN.f32 top1, $4, $5;
min.NaN.f32 bottom1, $4, $5;
setp.ge.f32 front, bottom0, top1;
setp.gt.f32 back, bottom1, top0;
abs.f32 m, top0;
mul.f32 low, top0, m;
abs.f32 m, $4;
@back mul.f32 low, $4, m;
abs.f32 m, $2;
@front mul.f32 low, $2, m;
abs.f32 m, top1;
mul.f32 high, top1, m;
abs.f32 m, $5;
@back mul.f32 high, $5, m;
abs.f32 m, $3;
@front mul.f32 high, $3, m;
cvt.rn.relu.DTYPEx2.f32 $0, high, low;
mov.b32 $1, 0x64324410;
@second add.s32 $1, $1, 0xffffcc35;
@fourth add.s32 $1, $1, 0xce120000;
@back mov.b32 $1, 0x32104446;
@front mov.b32 $1, 0x54443210; }"""

# The same of $6 relu(x)^2, $6 positive: the scales of a product of 8-bit floats.
_ROUND = "cvt.rn.relu.DTYPEx2.f32"
_MULTIPLY = "mul.f32 low, low, $6;\nmul.f32 high, high, $6;\n"
CHOOSE_SCALED = CHOOSE.replace(_ROUND, _MULTIPLY + _ROUND)

# The two bfloat16 of a pair, $1, times $2, in the low half of $0 as 8-bit floats: DTYPE is e4m3 or
# e5m2. Saturates; a NaN stays.
NARROW = """{ .reg .b32 part;
.reg .f32 low, high;
.reg .b16 both;
shl.b32 part, $1, 16;
mov.b32 low, part;
and.b32 part, $1, 0xffff0000;
mov.b32 high, part;
mul.f32 low, low, $2;
mul.f32 high, high, $2;
cvt.rn.satfinite.DTYPEx2.f32 both, high, low;
cvt.u32.u16 $0, both; }"""

# dY1 = 2 sqrt(Y2) dY2 of a group: $0 and $1 hold its four numbers, rounded, $2 the kept pair.
# $3 and $4 hold the four Y2, $5 .. $8 are dY2, $9 the kept indices i0 | i1 << 2. Where Y2 is zero
# so is dY1: the support needs no selection. The pair is bytes 2 i0, 2 i0 + 1, 2 i1 and 2 i1 + 1.
SCALE = """{ .reg .f32 a, b, c, d;
.reg .b32 lower, selector;
WIDEN
sqrt.approx.ftz.f32 a, a;
sqrt.approx.ftz.f32 b, b;
sqrt.approx.ftz.f32 c, c;
sqrt.approx.ftz.f32 d, d;
add.f32 a, a, a;
add.f32 b, b, b;
add.f32 c, c, c;
add.f32 d, d, d;
mul.f32 a, a, $5;
mul.f32 b, b, $6;
mul.f32 c, c, $7;
mul.f32 d, d, $8;
cvt.rn.DTYPEx2.f32 $0, b, a;
cvt.rn.DTYPEx2.f32 $1, d, c;
and.b32 lower, $9, 3;
mad.lo.s32 selector, $9, 0x880, 0x1010;
mad.lo.s32 selector, lower, -0x85e, selector;
prmt.b32 $2, $0, $1, selector; }"""

# The same with $10 for the 2: the scales of a product of 8-bit floats, doubled.
SCALE_SCALED = SCALE
for _name in "abcd":
    SCALE_SCALED = SCALE_SCALED.replace(
        f"add.f32 {_name}, {_name}, {_name};", f"mul.f32 {_name}, {_name}, $10;"
    )

# Y2 of a group, packed in $3 and $4, to float32.
WIDENINGS = {
    "bf16": """shl.b32 lower, $3, 16;
mov.b32 a, lower;
and.b32 lower, $3, 0xffff0000;
mov.b32 b, lower;
shl.b32 lower, $4, 16;
mov.b32 c, lower;
and.b32 lower, $4, 0xffff0000;
mov.b32 d, lower;""",
    "f16": """{ .reg .b16 low, high;
mov.b32 {low, high}, $3;
cvt.f32.f16 a, low;
cvt.f32.f16 b, high;
mov.b32 {low, high}, $4;
cvt.f32.f16 c, low;
cvt.f32.f16 d, high; }""",
}
