"""The softmax of one key block, in registers: cap, mask, row maximum, exps, row sums."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringfa3_kernels.hopper.gluon import out_layout, score_layout, tanh_exact, tanh_fast

CAP_FAST = gl.constexpr(1)
CAP_EXACT = gl.constexpr(2)
INTERVALS = gl.constexpr(2)
FLOOR = gl.constexpr(-1.0e30)  # for maxima: exp2(-inf - FLOOR) is 0 where exp2(-inf - -inf) is NaN


@gluon.jit
def cap(s, cap_scale, C: gl.constexpr):
    """tanh(s * scale / softcap); the factor softcap is folded into what exp2_block scales by."""
    if C.SOFTCAP == CAP_FAST:
        s = tanh_fast(s * cap_scale)
    elif C.SOFTCAP == CAP_EXACT:
        s = tanh_exact(s * cap_scale)
    return s


@gluon.jit
def hide(s, lo, hi, col0, C: gl.constexpr):
    """s with -inf where its key (columns count from col0) is not visible to its row.

    A thread holds columns 8 i + 2 lane + {0, 1}: compared as 8 i < hi - col0 - (2 lane + {0, 1}), the left side is an
    immediate. Written as key < hi, the 32 key numbers are hoisted out of the loops and spill.
    """
    S: gl.constexpr = score_layout(C)
    s8 = s.reshape([C.WM, C.BN // 8, 8])
    L: gl.constexpr = s8.type.layout
    ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, L))
    octet = (gl.arange(0, C.BN // 8, gl.SliceLayout(0, gl.SliceLayout(2, L))) * 8)[None, :][:, :, None]
    within = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, :]
    below = gl.convert_layout(hi - col0, ROWS)[:, None] - within
    keep = octet < below[:, None, :]
    if C.MASK == INTERVALS:
        above = gl.convert_layout(lo - col0, ROWS)[:, None] - within
        keep = keep & (octet >= above[:, None, :])
    return gl.convert_layout(gl.where(keep, s8, -float("inf")).reshape([C.WM, C.BN]), S, assert_trivial=True)


@gluon.jit
def new_max(s, m_i, scale, C: gl.constexpr):
    """The running maximum with this block: over a thread's registers first, then over the four lanes of a row."""
    R: gl.constexpr = m_i.type.layout
    in_thread = gl.max(s.reshape([C.WM, C.BN // 8, 8]), 1)
    m_new = gl.maximum(m_i, gl.convert_layout(gl.max(in_thread, 1), R) * scale)
    if C.GUARD:
        m_new = gl.maximum(m_new, FLOOR)
    return m_new


@gluon.jit
def exp_block(s, m_new, scale, C: gl.constexpr):
    """exp2(s * scale - m_new), and its row sums spread over 8 columns (added up once, at the end of the tile)."""
    p = gl.exp2(s * scale - m_new[:, None])
    return p, gl.sum(p.reshape([C.WM, C.BN // 8, 8]), 1)


@gluon.jit
def scaled(l_i, alpha):
    """Row sums spread over 8 columns, times a factor per row."""
    L: gl.constexpr = l_i.type.layout
    return l_i * gl.convert_layout(alpha, gl.SliceLayout(1, L))[:, None]


@gluon.jit
def row_total(l_i, R: gl.constexpr):
    """Row sums spread over 8 columns -> one per row, in layout R."""
    return gl.convert_layout(gl.sum(l_i, 1), R)


@gluon.jit
def to_operand(p, dtype: gl.constexpr, C: gl.constexpr):
    """fp32 probabilities -> the 16-bit register operand of P V; no data moves between threads."""
    A: gl.constexpr = gl.DotOperandLayout(0, out_layout(C), 2)
    return gl.convert_layout(p.to(dtype), A, assert_trivial=True)
