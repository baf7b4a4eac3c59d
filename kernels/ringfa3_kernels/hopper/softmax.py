"""The softmax of one key block, in registers: cap, mask, row maximum, exps, row sums."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringfa3_kernels.hopper.gluon import out_layout, pack_16, score_layout, tanh_exact, tanh_fast

CAP_FAST = gl.constexpr(1)
CAP_EXACT = gl.constexpr(2)
FLOOR = gl.constexpr(-1.0e30)  # for maxima: exp2(-inf - FLOOR) is 0 where exp2(-inf - -inf) is NaN


@gluon.jit
def cap(s, cap_scale, C: gl.constexpr):
    """tanh(s * scale / softcap); the factor softcap is folded into what exp_block scales by."""
    if C.SOFTCAP == CAP_FAST:
        s = tanh_fast(s * cap_scale)
    elif C.SOFTCAP == CAP_EXACT:
        s = tanh_exact(s * cap_scale)
    return s


@gluon.jit
def hide_after(s, hi, col0, C: gl.constexpr):
    """s with -inf where its key (columns count from col0) is hi, of its row, or a later one.

    A thread holds columns 8 i + 2 lane + {0, 1}: compared as 8 i < hi - col0 - (2 lane + {0, 1}), the left side is an
    immediate. Written as key < hi, the 32 key numbers are hoisted out of the loops and spill.
    """
    s8, octet, bound = _octets(s, hi - col0, C)
    return _columns(gl.where(octet < bound, s8, -float("inf")), C)


@gluon.jit
def hide_before(s, lo, col0, C: gl.constexpr):
    """s with -inf where its key is earlier than lo; as `hide_after`."""
    s8, octet, bound = _octets(s, lo - col0, C)
    return _columns(gl.where(octet >= bound, s8, -float("inf")), C)


@gluon.jit
def _octets(s, column, C: gl.constexpr):
    """s as [WM, BN / 8, 8], the first column of each octet, and each row's `column` less the column inside an octet."""
    s8 = s.reshape([C.WM, C.BN // 8, 8])
    L: gl.constexpr = s8.type.layout
    ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, L))
    octet = (gl.arange(0, C.BN // 8, gl.SliceLayout(0, gl.SliceLayout(2, L))) * 8)[None, :][:, :, None]
    within = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, :]
    return s8, octet, (gl.convert_layout(column, ROWS)[:, None] - within)[:, None, :]


@gluon.jit
def _columns(s8, C: gl.constexpr):
    """[WM, BN / 8, 8] -> [WM, BN]."""
    return gl.convert_layout(s8.reshape([C.WM, C.BN]), score_layout(C), assert_trivial=True)


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
def carried(p, dtype: gl.constexpr, C: gl.constexpr):
    """fp32 probabilities as they travel round the key loop: the operand itself or, PACKED, int32 [WM, BN / 2]."""
    if C.PACKED:
        even, odd = gl.split(p.reshape([C.WM, C.BN // 2, 2]))
        return pack_16(even, odd, dtype)
    else:
        return _as_operand(p.to(dtype), C)


@gluon.jit
def operand(p, dtype: gl.constexpr, C: gl.constexpr):
    """What `carried` made -> the 16-bit register operand of P V; no data moves between threads."""
    if C.PACKED:
        pair = gl.join(p.to(gl.int16), (p >> 16).to(gl.int16))
        return _as_operand(pair.reshape([C.WM, C.BN]).to(dtype, bitcast=True), C)
    else:
        return p


@gluon.jit
def _as_operand(p, C: gl.constexpr):
    A: gl.constexpr = gl.DotOperandLayout(0, out_layout(C), 2)
    return gl.convert_layout(p, A, assert_trivial=True)
