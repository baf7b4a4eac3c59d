"""The softmax of one key block in the fp8 forward: scales, row maximum, exps, and P as e4m3 registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringfa3_kernels.hopper.gluon import out_layout, rescale_if_needed
from ringfa3_kernels.hopper.softmax import FLOOR

TINY = gl.constexpr(1.0e-30)  # least factor on scores: a product of scales that underflows would make -inf * 0


@gluon.constexpr_function
def fp8_score_layout(C):
    """fp32 [BM / NWG, BN]: the accumulator of Q K^T, one warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BN, 32])


@gluon.constexpr_function
def fp8_out_layout(C):
    """fp32 [BM / NWG, D]: the accumulator of P V, one warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.D, 32])


@gluon.jit
def factor(row_factor, k_scale, C: gl.constexpr):
    """What a block's scores are multiplied by, per row: before the softcap, or in exp2."""
    by = row_factor * k_scale
    if not C.SOFTCAP:
        by = gl.maximum(by, TINY)
    return by


@gluon.jit
def reciprocal(x):
    """1 / x to an ulp, in one instruction; for powers of two, which scales are, exact."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def fp8_new_max(s, m_i, scale, C: gl.constexpr):
    """The running maximum with this block, less SHIFT; scale per row. Over a thread's registers first, then lanes."""
    R: gl.constexpr = m_i.type.layout
    in_thread = gl.max(s.reshape([C.WM, C.BN // 8, 8]), 1)
    m_new = gl.maximum(m_i, gl.convert_layout(gl.max(in_thread, 1), R) * scale - C.SHIFT)
    if C.GUARD:
        m_new = gl.maximum(m_new, FLOOR)
    return m_new


@gluon.jit
def fp8_exp_block(s, m_new, scale, C: gl.constexpr):
    """exp2(s * scale - m_new), scale per row, and its row sums spread over 8 columns."""
    p = gl.exp2(s * scale[:, None] - m_new[:, None])
    return p, gl.sum(p.reshape([C.WM, C.BN // 8, 8]), 1)


@gluon.jit
def packed(p, C: gl.constexpr):
    """fp32 P [WM, BN] -> int32 [WM, BN / 4], four e4m3 in each: what one thread holds of 16 keys.

    Keys 8 c + 2 t + b of thread t (of four) become bytes 2 c + b: the order in which V's keys lie in memory
    (quantized.key_order), so that no data moves between threads. Carried round the loop as 8-bit numbers ptxas takes
    them apart (110 PRMT a step).
    """
    x = p.reshape([C.WM, C.BN // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([C.WM, C.BN // 4, 2, 2])
    even, odd = gl.split(x)
    even0, even1 = gl.split(even)
    odd0, odd1 = gl.split(odd)
    return gl.inline_asm_elementwise(
        "{ .reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; "
        "mov.b32 $0, {lo, hi}; }",
        "=r,f,f,f,f",
        [even0, odd0, even1, odd1],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.constexpr_function
def _four_keys_a_register(layout):
    """Whether a thread's numbers come in fours that differ in the lowest bits of the key."""
    return layout.reg_bases[:2] == [[0, 1], [0, 2]]


@gluon.jit
def fp8_operand(p, C: gl.constexpr):
    """What `packed` made -> the register operand of P V, the same registers."""
    A: gl.constexpr = gl.DotOperandLayout(0, fp8_out_layout(C), 4)
    REGISTERS: gl.constexpr = gl.to_linear_layout(A, [C.WM, C.BN])
    gl.static_assert(_four_keys_a_register(REGISTERS))
    pair = gl.join(p, p)
    four = gl.join(pair, pair).reshape([C.WM, C.BN])  # the same register four times, one for each number that it holds
    four = gl.convert_layout(four, A, assert_trivial=True)
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", [four], dtype=gl.float8e4nv, is_pure=True, pack=4)


@gluon.jit
def rescaled(acc, alpha, C: gl.constexpr):
    """acc times a factor per row; with LAZY, warps without a factor other than 1 skip it."""
    L: gl.constexpr = acc.type.layout
    if C.LAZY:
        acc = rescale_if_needed(gl.convert_layout(acc, out_layout(C), assert_trivial=True), alpha, C)
        return gl.convert_layout(acc, L, assert_trivial=True)
    else:
        return acc * gl.convert_layout(alpha, gl.SliceLayout(1, L))[:, None]
