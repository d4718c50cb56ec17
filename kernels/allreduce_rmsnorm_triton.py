"""The sum over the ranks, residual add, RMSNorm and exchange of the results in one launch, over peer memory.

Two phases, between which the blocks of all ranks meet. In the first, a block sums tiles of the rows that its rank owns
from all ranks' buffers, and leaves the results in this rank's shard; in the second, it pulls the same tiles of the
other ranks' shards. Both directions of the links are busy in both phases, for every rank pulls. What it pulls goes into
ordinary memory: nobody else writes there, so that it needs no address that others know, lives as long as any tensor and
is not copied again, for the price of writing the own rows twice.

Blocks meet block by block: block b of a rank tells block b of each other that it has come, by a word of the other's
memory, and waits for the others' words in its own. Words count up for ever, so that nothing is reset and a CUDA graph
can be replayed. At the first meeting all ranks' earlier kernels are over, after the second nobody reads this rank's
inputs any more. All blocks of a launch must be on the GPU at once, and all ranks must launch as many.

Pulling needs many bytes in flight: loops with an explicit `num_stages` load asynchronously into shared memory.

Names: T rows on all ranks, D width, R rows of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 16384
MAX_WORLD = 8
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_SHARED_MEMORY = 200 << 10
_PULL_MEMORY = 128 << 10
_MAX_ROWS = 8

# An error word: which kernel waited at which meeting in which block, and for whom.
_ERROR = tl.constexpr(1 << 30)
_BACKWARD = tl.constexpr(1 << 29)
_REDUCE = tl.constexpr(1 << 28)
_GATHER = tl.constexpr(1 << 27)
_SECOND_MEETING = tl.constexpr(1 << 26)
_PEER_SHIFT = tl.constexpr(16)


@dataclass(frozen=True)
class Meeting:
    """What the blocks of a rank meet those of the others by.

    Attributes
    ----------
    flags : int32 [blocks, W] of each rank, this one's first, then the following ones'; zeros at the start
    state : int32 [1 + blocks] of this rank: whether a wait was in vain, and how often each block has met; zeros at the
        start
    error : int32 [1] that the host can read at any time; 0, or what :func:`describe_error` tells
    timeout_ms : how long a block waits for another rank
    """

    flags: tuple[Tensor, ...]
    state: Tensor
    error: Tensor
    timeout_ms: int


def describe_error(word: int) -> tuple[str, str, int, int]:
    """Kernel, meeting, position among the ranks of the one that did not come, and block."""
    form = {
        _REDUCE.value | _GATHER.value: "fused_allreduce_rmsnorm",
        _REDUCE.value: "reduce_scatter_add_rmsnorm",
        _GATHER.value: "add_rmsnorm_all_gather",
    }
    backward = bool(word & _BACKWARD.value)
    reduce, gather = (_GATHER, _REDUCE) if backward else (_REDUCE, _GATHER)  # the forward pass's, which names it
    kinds = (_REDUCE.value if word & reduce.value else 0) | (_GATHER.value if word & gather.value else 0)
    kernel = f"{form[kinds]} {'backward' if backward else 'forward'}"
    meeting = "end" if word & _SECOND_MEETING.value else "start"
    return kernel, meeting, word >> _PEER_SHIFT.value & 7, word & (1 << _PEER_SHIFT.value) - 1


@dataclass(frozen=True)
class Tile:
    """How a kernel walks its rows."""

    rows: int
    warps: int
    stages: int
    pull_stages: int


def choose_tile(width: int, itemsize: int, streams: int, blocks: int, most: int = 16384) -> Tile:
    """For tensors of `width` columns, of which a kernel loads `streams` at once, at `most` so many elements of each.

    The fewer blocks, the more each must have in flight. Measured on two H200s at widths 4096 and 8192.
    """
    padded = triton.next_power_of_2(width)
    elements = min(most, 16384 if blocks <= 14 else 8192 if blocks < 20 else 4096)
    rows = min(max(1, elements // padded), _MAX_ROWS)
    bytes_of_tile = rows * padded * itemsize
    return Tile(
        rows,
        warps=8 if rows * padded <= 4096 else 16,
        stages=min(4, 1 + _SHARED_MEMORY // (bytes_of_tile * streams)),
        pull_stages=min(8, 1 + _PULL_MEMORY // bytes_of_tile),
    )


def forward(
    xs: Sequence[Tensor],
    shards: Sequence[Tensor],
    residual_RD: Tensor,
    weight_D: Tensor,
    eps: float,
    total_rows: int,
    rank: int,
    blocks: int,
    meeting: Meeting | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h and 1 / rms(h) of :func:`~moetrain.kernels.allreduce_rmsnorm.add_rmsnorm`.

    Parameters
    ----------
    xs : the ranks' summands [T, D], this rank's first, then the following ones'; or this rank's rows alone, summed
    shards : where each rank leaves at least ⌈T / W⌉ rows of results for the others, in the same order; or nothing, if
        y is to be of this rank's rows alone
    rank : which rank this is
    meeting : None where nobody has to be waited for
    """
    reduce, gather = len(xs) > 1, len(shards) > 1
    world = max(len(xs), len(shards), 1)
    rows, width = residual_RD.shape
    y = xs[0].new_empty(total_rows if gather else rows, width)
    h_RD = torch.empty_like(residual_RD, memory_format=torch.contiguous_format)
    rstd_R = torch.empty(rows, dtype=torch.float32, device=y.device)
    tile = choose_tile(width, y.element_size(), len(xs) + 1, blocks)
    with torch.cuda.device_of(y):
        add_rmsnorm_forward_kernel[(blocks,)](
            tuple(xs),
            tuple(shards),
            residual_RD,
            weight_D,
            y,
            h_RD,
            rstd_R,
            *_meeting_arguments(meeting),
            rank,
            total_rows,
            eps,
            D=width,
            BLOCK_D=triton.next_power_of_2(width),
            BLOCK_R=tile.rows,
            STAGES=tile.stages,
            PULL_STAGES=tile.pull_stages,
            WORLD=world,
            REDUCE=reduce,
            GATHER=gather,
            MEET=meeting is not None,
            num_warps=tile.warps,
        )
    return y, h_RD, rstd_R


def backward(
    dys: Sequence[Tensor],
    shards: Sequence[Tensor],
    dresidual_RD: Tensor,
    h_RD: Tensor,
    rstd_R: Tensor,
    weight_D: Tensor,
    total_rows: int,
    rank: int,
    blocks: int,
    meeting: Meeting | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (of all rows, if there are `shards`), dresidual and dweight, as of
    :func:`~moetrain.kernels.allreduce_rmsnorm.add_rmsnorm_backward`; the same bits every time.

    `dys` and `shards` are to this what `xs` and `shards` are to :func:`forward`. dx has the dtype of dy.
    """
    reduce, gather = len(dys) > 1, len(shards) > 1
    width = h_RD.shape[1]
    dx = dys[0].new_empty(total_rows, width) if gather else None
    dh_RD = torch.empty_like(h_RD)
    dweight_BD = torch.empty(blocks, width, dtype=torch.float32, device=h_RD.device)
    tile = choose_tile(width, dys[0].element_size(), len(dys) + 2, blocks, most=8192)  # registers hold no more
    with torch.cuda.device_of(h_RD):
        add_rmsnorm_backward_kernel[(blocks,)](
            tuple(dys),
            tuple(shards),
            dresidual_RD,
            h_RD,
            rstd_R,
            weight_D,
            dx,
            dh_RD,
            dweight_BD,
            *_meeting_arguments(meeting),
            rank,
            total_rows,
            D=width,
            BLOCK_D=triton.next_power_of_2(width),
            BLOCK_R=tile.rows,
            STAGES=tile.stages,
            PULL_STAGES=tile.pull_stages,
            WORLD=max(len(dys), len(shards), 1),
            REDUCE=reduce,
            GATHER=gather,
            MEET=meeting is not None,
            num_warps=tile.warps,
        )
    return dh_RD.to(dys[0].dtype) if dx is None else dx, dh_RD, dweight_BD.sum(0).to(weight_D.dtype)


def _meeting_arguments(meeting: Meeting | None) -> tuple[object, ...]:
    if meeting is None:
        return (), None, None, 0
    return meeting.flags, meeting.state, meeting.error, meeting.timeout_ms


def _named(kernel: str) -> Callable[[Any], str]:
    """What a profile calls a kernel: whether it exchanges rows with other ranks is in its name."""
    return lambda special: ("exchange_" if special.constants.get("MEET") else "") + kernel


@triton.jit(do_not_specialize=["timeout_ms", "rank", "total_rows", "eps"], repr=_named("add_rmsnorm_forward_kernel"))
def add_rmsnorm_forward_kernel(
    xs,
    shards,
    residual,
    weight,
    y,
    h,
    rstd,
    flags,
    state,
    error,
    timeout_ms,
    rank,
    total_rows,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    PULL_STAGES: tl.constexpr,
    WORLD: tl.constexpr,
    REDUCE: tl.constexpr,
    GATHER: tl.constexpr,
    MEET: tl.constexpr,
):
    dtype: tl.constexpr = y.dtype.element_ty
    column_D = tl.arange(0, BLOCK_D)
    exists_D = column_D < D
    first, rows = _owned(rank, total_rows, WORLD)
    weight_D = tl.load(weight + column_D, mask=exists_D, other=0.0).to(tl.float32)
    if MEET:
        code: tl.constexpr = _ERROR + REDUCE * _REDUCE + GATHER * _GATHER
        met = tl.load(state + 1 + tl.program_id(0))
        _meet(flags, state, error, timeout_ms, rank, met + 1, code, WORLD)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0), num_stages=STAGES):
        row_R, own_RD, exists_RD = _places(tile, rows, column_D, exists_D, D, BLOCK_R)
        whole_RD = own_RD + first.to(tl.int64) * D
        in_RD = whole_RD if REDUCE else own_RD
        sum_RD = tl.load(xs[0] + in_RD, mask=exists_D[None, :], other=0.0).to(tl.float32)
        if REDUCE:
            for i in tl.static_range(1, WORLD):
                sum_RD += tl.load(xs[i] + in_RD, mask=exists_D[None, :], other=0.0).to(tl.float32)
        sum_RD += tl.load(residual + own_RD, mask=exists_D[None, :], other=0.0).to(tl.float32)
        rounded_RD = sum_RD.to(h.dtype.element_ty)
        tl.store(h + own_RD, rounded_RD, mask=exists_RD)
        h_RD = rounded_RD.to(tl.float32)
        rstd_R = tl.rsqrt(tl.sum(h_RD * h_RD, 1) / D + eps)
        tl.store(rstd + row_R, rstd_R, mask=row_R < rows)
        y_RD = (h_RD * rstd_R[:, None] * weight_D[None, :]).to(dtype)
        if GATHER:
            tl.store(shards[0] + own_RD, y_RD, mask=exists_RD)
            tl.store(y + whole_RD, y_RD, mask=exists_RD)
        else:
            tl.store(y + own_RD, y_RD, mask=exists_RD)
    if MEET:
        _meet(flags, state, error, timeout_ms, rank, met + 2, code + _SECOND_MEETING, WORLD)
        tl.store(state + 1 + tl.program_id(0), met + 2)
    if GATHER:
        _pull(shards, y, rank, total_rows, column_D, exists_D, D, BLOCK_R, PULL_STAGES, WORLD)


@triton.jit(do_not_specialize=["timeout_ms", "rank", "total_rows"], repr=_named("add_rmsnorm_backward_kernel"))
def add_rmsnorm_backward_kernel(
    dys,
    shards,
    dresidual,
    h,
    rstd,
    weight,
    dx,
    dh,
    dweight,
    flags,
    state,
    error,
    timeout_ms,
    rank,
    total_rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    PULL_STAGES: tl.constexpr,
    WORLD: tl.constexpr,
    REDUCE: tl.constexpr,
    GATHER: tl.constexpr,
    MEET: tl.constexpr,
):
    column_D = tl.arange(0, BLOCK_D)
    exists_D = column_D < D
    first, rows = _owned(rank, total_rows, WORLD)
    weight_D = tl.load(weight + column_D, mask=exists_D, other=0.0).to(tl.float32)
    if MEET:
        code: tl.constexpr = _ERROR + _BACKWARD + REDUCE * _REDUCE + GATHER * _GATHER
        met = tl.load(state + 1 + tl.program_id(0))
        _meet(flags, state, error, timeout_ms, rank, met + 1, code, WORLD)
    dweight_D = tl.zeros((BLOCK_D,), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0), num_stages=STAGES):
        row_R, own_RD, exists_RD = _places(tile, rows, column_D, exists_D, D, BLOCK_R)
        whole_RD = own_RD + first.to(tl.int64) * D
        in_RD = whole_RD if REDUCE else own_RD
        dy_RD = tl.load(dys[0] + in_RD, mask=exists_D[None, :], other=0.0).to(tl.float32)
        if REDUCE:
            for i in tl.static_range(1, WORLD):
                dy_RD += tl.load(dys[i] + in_RD, mask=exists_D[None, :], other=0.0).to(tl.float32)
        rstd_R = tl.load(rstd + row_R, mask=row_R < rows, other=0.0)  # 0 for rows that do not exist: they add nothing
        h_RD = tl.load(h + own_RD, mask=exists_D[None, :], other=0.0)
        dresidual_RD = tl.load(dresidual + own_RD, mask=exists_D[None, :], other=0.0)
        normed_RD = h_RD.to(tl.float32) * rstd_R[:, None]
        dweight_D += tl.sum(dy_RD * normed_RD, 0)
        g_RD = dy_RD * weight_D[None, :]
        mean_R = tl.sum(g_RD * normed_RD, 1) / D
        dh_RD = rstd_R[:, None] * (g_RD - normed_RD * mean_R[:, None]) + dresidual_RD.to(tl.float32)
        tl.store(dh + own_RD, dh_RD.to(dh.dtype.element_ty), mask=exists_RD)
        if GATHER:
            dx_RD = dh_RD.to(dx.dtype.element_ty)
            tl.store(shards[0] + own_RD, dx_RD, mask=exists_RD)
            tl.store(dx + whole_RD, dx_RD, mask=exists_RD)
    tl.store(dweight + tl.program_id(0) * D + column_D, dweight_D, mask=exists_D)
    if MEET:
        _meet(flags, state, error, timeout_ms, rank, met + 2, code + _SECOND_MEETING, WORLD)
        tl.store(state + 1 + tl.program_id(0), met + 2)
    if GATHER:
        _pull(shards, dx, rank, total_rows, column_D, exists_D, D, BLOCK_R, PULL_STAGES, WORLD)


@triton.jit
def _owned(rank, total_rows, WORLD: tl.constexpr):
    share = tl.cdiv(total_rows, WORLD)
    first = tl.minimum(rank * share, total_rows)
    return first, tl.minimum(share, total_rows - first)


@triton.jit
def _places(tile, rows, column_D, exists_D, D: tl.constexpr, BLOCK_R: tl.constexpr):
    """The rows of a tile, where their elements are in a rank's shard, and which of them exist: a load may read a row
    twice, a store may not write one twice."""
    row_R = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    place_RD = tl.minimum(row_R, rows - 1).to(tl.int64)[:, None] * D + column_D[None, :]
    return row_R, place_RD, (row_R < rows)[:, None] & exists_D[None, :]


@triton.jit
def _pull(
    shards,
    out,
    rank,
    total_rows,
    column_D,
    exists_D,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    WORLD: tl.constexpr,
):
    """The tiles of the other ranks' shards that their blocks of this number have written."""
    for i in tl.static_range(1, WORLD):
        first, rows = _owned((rank + i) % WORLD, total_rows, WORLD)
        for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0), num_stages=STAGES):
            _, place_RD, exists_RD = _places(tile, rows, column_D, exists_D, D, BLOCK_R)
            piece_RD = tl.load(shards[i] + place_RD, mask=exists_D[None, :], other=0.0)
            tl.store(out + place_RD + first.to(tl.int64) * D, piece_RD, mask=exists_RD)


@triton.jit
def _meet(flags, state, error, timeout_ms, rank, count, code, WORLD: tl.constexpr):
    """What any rank's block of this number wrote before is seen by those of all ranks after it.

    Each other rank has a warp that talks to it, so that all are waited for at the same time.
    """
    block = tl.program_id(0)
    tl.debug_barrier()
    for i in tl.static_range(1, WORLD):
        _signal(flags[i] + block * WORLD + rank, count, (i - 1) * 32)
    for i in tl.static_range(1, WORLD):
        peer = (rank + i) % WORLD
        word = code + (peer << _PEER_SHIFT) + block
        _await(flags[0] + block * WORLD + peer, count, (i - 1) * 32, timeout_ms, state, error, word)
    tl.debug_barrier()


@triton.jit
def _signal(flag, count, thread):
    tl.inline_asm_elementwise(
        """{
            .reg .pred %p;
            .reg .u32 %thread;
            mov.u32 $0, 0;
            mov.u32 %thread, %tid.x;
            setp.eq.u32 %p, %thread, $3;
            @%p st.release.sys.global.u32 [$1], $2;
        }""",
        "=&r,l,r,r",
        [flag.to(tl.int64), count, thread],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _await(flag, count, thread, timeout_ms, broken, error, word):
    """Until the flag has reached `count`, or in vain, or if an earlier wait was in vain: then all that follows ends."""
    tl.inline_asm_elementwise(
        """{
            .reg .pred %p;
            .reg .u32 %u;
            .reg .u64 %start, %now, %limit;
            mov.u32 $0, 0;
            mov.u32 %u, %tid.x;
            setp.ne.u32 %p, %u, $3;
            @%p bra CAME;
            mov.u64 %start, %globaltimer;
            mul.wide.u32 %limit, $4, 1000000;
        SPIN:
            ld.acquire.sys.global.u32 %u, [$1];
            sub.u32 %u, %u, $2;
            setp.ge.s32 %p, %u, 0;
            @%p bra CAME;
            ld.relaxed.gpu.global.u32 %u, [$5];
            setp.ne.u32 %p, %u, 0;
            @%p bra CAME;
            mov.u64 %now, %globaltimer;
            sub.u64 %now, %now, %start;
            setp.lt.u64 %p, %now, %limit;
            @%p bra SPIN;
            st.relaxed.gpu.global.u32 [$5], 1;
            st.relaxed.sys.global.u32 [$6], $7;
        CAME:
        }""",
        "=&r,l,r,r,r,l,l,r",
        [flag.to(tl.int64), count, thread, timeout_ms, broken.to(tl.int64), error.to(tl.int64), word],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
