"""What Triton's Gluon dialect lacks, or renamed between 3.6 and 3.9: all that knows versions or inline assembly."""

from dataclasses import fields
from typing import Any

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core as gluon_core
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language import core

# 3.9 names the copies after what they do; the old names raise there.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait


@gluon_core.builtin
def _tma_reduce_add(tensor_desc, coord, src, _semantic=None):
    """Add shared memory to what a descriptor covers (cp.reduce.async.bulk.tensor): 3.6 has no wrapper for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


@gluon_core.builtin
def reinterpret(memory, dtype, shape, layout, _semantic=None):
    """Shared memory as buffers of another type, shape and layout: 3.9 calls the method by another name."""
    method = memory.reinterpret if hasattr(memory, "reinterpret") else memory._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)


tma_reduce_add = tma.async_atomic_add if hasattr(tma, "async_atomic_add") else _tma_reduce_add


def aggregate(cls: Any) -> Any:
    """Class decorator: its annotated fields, given by keyword, travel through kernels as one value."""
    if hasattr(gluon, "aggregate"):
        return gluon.aggregate(cls)
    cls.__init__ = _set_fields  # 3.6 asks for a constructor, 3.9 writes one
    return core._aggregate(cls)


@gluon.constexpr_function
def _set_fields(self, **values):
    for name, value in values.items():
        setattr(self, name, value)


class Constants:
    """A Config as kernels take it: the same names, each a gl.constexpr, so that shapes and loops may use them."""

    def __init__(self, config):
        self._config = config
        names = [f.name for f in fields(config)] + [n for n, x in vars(type(config)).items() if isinstance(x, property)]
        for name in names:
            setattr(self, name, gl.constexpr(getattr(config, name)))

    def __eq__(self, other):
        return isinstance(other, Constants) and self._config == other._config

    def __hash__(self):
        return hash(self._config)

    def __repr__(self):
        return repr(self._config)  # goes into Triton's cache key


@gluon.constexpr_function
def score_layout(C):
    """fp32 [BM / NWG, BN]: the accumulator of Q K^T, one warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BN, 16])


@gluon.constexpr_function
def out_layout(C):
    """fp32 [BM / NWG, D]: the accumulator of P V, one warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.D, 16])


@gluon.constexpr_function
def line_layout(C):
    """[BM / NWG, D] of 16 bits: `out_layout`, columns exchanged in quads of lanes so that each has 16 bytes."""
    columns = [[0, n] for n in (32, 64, 128) if n < C.D]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], *columns],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [C.WM, C.D],
    )


@gluon.constexpr_function
def ring_shape(n, shape):
    """Shape of n buffers."""
    return [n, *shape]


@gluon.jit
def barrier_sync(bar, threads: gl.constexpr):
    """Wait until `threads` threads, arrivals included, have come to named barrier `bar` (Triton takes 0 to 4)."""
    gl.inline_asm_elementwise(
        f"bar.sync $1, {threads}; mov.u32 $0, $1;", "=r,r,~{memory}", [bar], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def barrier_arrive(bar, threads: gl.constexpr):
    """Come to named barrier `bar` without waiting."""
    gl.inline_asm_elementwise(
        f"bar.arrive $1, {threads}; mov.u32 $0, $1;", "=r,r,~{memory}", [bar], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def barrier_arrive_after(bar, x, threads: gl.constexpr):
    """`barrier_arrive` that ptxas cannot move above the computation of x, a fp32 value per row."""
    b = gl.full([x.shape[0]], 0, gl.int32, x.type.layout) + bar
    gl.inline_asm_elementwise(
        f"{{ .reg .pred p; setp.num.f32 p, $4, $5; @p bar.arrive $2, {threads}; @!p bar.arrive $3, {threads}; "
        "mov.b32 $0, $2; mov.b32 $1, $3; }",
        "=r,=r,r,r,f,f,~{memory}",
        [b, x],
        dtype=gl.int32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def again(x):
    """x (int32), but opaque: what is computed from it is neither hoisted nor kept alive through an earlier loop."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def this_cta():
    """program_id(0), read where it stands: shared by the partitions it would be read at entry, and spill."""
    return gl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def take_ticket(counter, sem: gl.constexpr):
    """Count an int32 in memory up by one, for the calling warp (a partition of one): what it was, for all lanes.

    Not gl.atomic_add: its lane 0 gets the number through a vote and hands it on through shared memory, and where the
    GPU is shared by processes, a warp that is switched out meanwhile may get a wrong number (docs/decisions.md).
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0; mov.b32 $0, 0; "
        f"@first atom.{sem}.gpu.global.add.u32 $0, [$1], 1; shfl.sync.idx.b32 $0, $0, 0, 31, 0xffffffff; }}",
        "=&r,l",
        [counter.to(gl.int64, bitcast=True)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def wide_product(x, stride):
    """x * stride in 64 bits; the sign bits of an int32 stride take no register from the loops (they made it spill)."""
    if stride.dtype == gl.int32:
        stride = again(stride)
    return x.to(gl.int64) * stride.to(gl.int64)


@gluon.jit
def pack_16(low, high, dtype: gl.constexpr):
    """Two fp32 rounded to 16 bits, in one int32."""
    KIND: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    return gl.inline_asm_elementwise(
        f"cvt.rn.{KIND}.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def tanh_fast(x):
    """tanh to a relative 2^-11, one instruction: finer than the bf16 scores plain PyTorch would cap."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def tanh_exact(x):
    """tanh to an absolute 2^-22, through exp2: for fp16, whose scores are finer than tanh_fast."""
    return 1.0 - 2.0 / (gl.exp2(x * 2.8853900817779268) + 1.0)


@gluon.constexpr_function
def _rescale_asm(n):
    """n registers, 4 factors (registers i, i + 4, ... share a factor: two rows, both columns of a pair)."""
    first, second = 2 * n, 2 * n + 2
    vote = (
        f"{{ .reg .pred p, q; setp.neu.f32 p, ${first}, 0f3F800000; setp.neu.or.f32 p, ${second}, 0f3F800000, p; "
        "vote.sync.any.pred q, p, 0xffffffff; @!q bra SKIP; "
    )
    return vote + "".join(f"mul.f32 ${i}, ${i}, ${2 * n + i % 4}; " for i in range(n)) + "SKIP: }"


@gluon.constexpr_function
def _rescale_constraints(n):
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


@gluon.jit
def rescale_if_needed(acc, alpha, C: gl.constexpr):
    """acc * alpha[:, None]; a warp none of whose rows changes skips the products (one vote, one branch)."""
    OUT: gl.constexpr = out_layout(C)
    N: gl.constexpr = C.D // 2
    factor, acc = gl.broadcast(gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None], acc)
    return gl.inline_asm_elementwise(
        _rescale_asm(N), _rescale_constraints(N), [acc, factor], dtype=gl.float32, is_pure=True, pack=N
    )
