"""Device code of the grouped GEMMs for Hopper (sm_90), in Gluon: warp-specialised, persistent.

Every kernel is a ring of shared-memory slots between a loader partition, which fills them by TMA and by asynchronous
row gathers, and an MMA partition, which multiplies and writes its tiles by TMA.

Names: E experts, N pairs (rows), D width, I expert width; a tile is BLOCK_M rows of one expert × BLOCK_N columns. The
last column tile of a row is half as wide where that is enough, but not in the hidden gradient: registers run out.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moetrain.kernels import activation as _activation
from moetrain.kernels import tile_schedule as _tile_schedule

# These names changed after triton 3.6.
aggregate = gluon.aggregate if hasattr(gluon, "aggregate") else tl.core._aggregate
partition_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
gather_to_shared = (
    async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
)
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

_function_and_derivative = gluon.jit(_activation.function_and_derivative.fn)
_work_item = gluon.jit(_tile_schedule.work_item.fn)

HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

RAGGED_ROWS = gl.constexpr(0x40000000)
"""Rows of a ragged descriptor's innermost row dimension, see :func:`ragged`."""


@gluon.jit
def sigmoid(x):
    """1 / (1 + 2^(−x log₂e)) by the two hardware approximations, within 2⁻²¹: fewer instructions to hide than exp."""
    exponential = gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634], dtype=gl.float32, is_pure=True, pack=1
    )
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + exponential], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def function_and_derivative(x, FUNCTION: gl.constexpr):
    """f(x) and f′(x) in float32, as :func:`moetrain.kernels.activation.function_and_derivative`."""
    if FUNCTION == "silu":
        gate = sigmoid(x)
        value = x * gate
        derivative = gate + value * (1.0 - gate)
    else:
        value, derivative = _function_and_derivative(x, FUNCTION)
    return value, derivative


@aggregate
class Work:
    """This program's work items, a row tile and a column tile each (:mod:`moetrain.kernels.tile_schedule`).

    The last column tile has LAST columns, a tile or half of one. Where it is half, weights are loaded by halves.
    """

    offsets: gl.tensor
    tile_experts: gl.tensor
    expert_tiles: gl.tensor
    num_items: gl.tensor
    COLUMN_TILES: gl.constexpr
    BLOCK_N: gl.constexpr
    LAST: gl.constexpr
    BLOCK_M: gl.constexpr
    GROUP: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, offsets, tile_experts, expert_tiles, num_items, COLUMN_TILES, BLOCK_N, LAST, BLOCK_M, GROUP):
        self.offsets = offsets
        self.tile_experts = tile_experts
        self.expert_tiles = expert_tiles
        self.num_items = num_items
        self.COLUMN_TILES = gl.constexpr(COLUMN_TILES)
        self.BLOCK_N = gl.constexpr(BLOCK_N)
        self.LAST = gl.constexpr(LAST)
        self.BLOCK_M = gl.constexpr(BLOCK_M)
        self.GROUP = gl.constexpr(GROUP)

    @gluon.jit
    def item(self, index):
        """Expert, first row, end of the expert's rows and column tile."""
        expert, first, end, column = _work_item(
            index, self.num_items, self.offsets, self.tile_experts, self.expert_tiles, self.COLUMN_TILES, self.BLOCK_M,
            self.GROUP,
        )  # fmt: skip
        # Where the programs together take whole rows of tiles, each would meet the same column in every round, and some
        # get nothing but half tiles.
        if self.LAST < self.BLOCK_N and self.GROUP == 1 and gl.num_programs(0) % self.COLUMN_TILES == 0:
            column = (column + index // gl.num_programs(0)) % self.COLUMN_TILES
        return expert, first, end, column


@gluon.constexpr_function
def last_columns(columns, block):
    """Columns to compute of the last tile: half a tile where that is enough, whole ones come before, and it saves a
    twentieth of the product or more (at 4% of 8192,2880,2880,32,4 the second path in the loop cost more, 6%)."""
    tiles = (columns + block - 1) // block
    return block // 2 if 1 < tiles <= 10 and 0 < columns % block <= block // 2 else block


@gluon.jit
def make_work(
    offsets, tile_experts, expert_tiles, num_experts, COLUMNS: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, LAST: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    COLUMN_TILES: gl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    num_items = gl.load(expert_tiles + num_experts) * COLUMN_TILES
    return Work(offsets, tile_experts, expert_tiles, num_items, COLUMN_TILES, BLOCK_N, LAST, BLOCK_M, GROUP)


@aggregate
class Ring:
    """Slots for one k-step of both operands, with a barrier each for "filled" and "free"."""

    a: gl.shared_memory_descriptor
    b: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, a, b, full, empty):
        self.a = a
        self.b = b
        self.full = full
        self.empty = empty

    @gluon.jit
    def acquire(self, step):
        """The loader's slot of its k-step number `step`, once the MMA partition has freed it."""
        slot = step % self.full.shape[0]
        mbarrier.wait(self.empty.index(slot), ((step // self.full.shape[0]) & 1) ^ 1)
        return slot, self.full.index(slot)

    @gluon.jit
    def wait_full(self, step):
        slot = step % self.full.shape[0]
        mbarrier.wait(self.full.index(slot), (step // self.full.shape[0]) & 1)
        return slot

    @gluon.jit
    def release_before(self, step, pred):
        """Free the slot of the k-step before `step`."""
        mbarrier.arrive(self.empty.index((step + self.full.shape[0] - 1) % self.full.shape[0]), pred=pred)


@gluon.jit
def make_ring(
    DTYPE: gl.constexpr,
    A_SHAPE: gl.constexpr,
    B_SHAPE: gl.constexpr,
    A_LAYOUT: gl.constexpr,
    B_LAYOUT: gl.constexpr,
    STAGES: gl.constexpr,
    ARRIVALS: gl.constexpr,
):
    a = gl.allocate_shared_memory(DTYPE, [STAGES, A_SHAPE[0], A_SHAPE[1]], A_LAYOUT)
    b = gl.allocate_shared_memory(DTYPE, [STAGES, B_SHAPE[0], B_SHAPE[1]], B_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=ARRIVALS)
        mbarrier.init(empty.index(i), count=1)
    return Ring(a, b, full, empty)


@gluon.jit
def reshaped(buffer, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The same shared memory in another shape and layout."""
    if HAS_REINTERPRET:
        view = buffer.reinterpret(buffer.dtype, SHAPE, LAYOUT)
    else:
        view = buffer._reinterpret(buffer.dtype, SHAPE, LAYOUT)
    return view


@gluon.jit
def start_of(buffer, SHAPE: gl.constexpr):
    """The first columns (or rows) of a block: of 64 columns each, the swizzle keeps all rows together."""
    LAYOUT: gl.constexpr = buffer.layout
    return reshaped(buffer, SHAPE, LAYOUT)


@gluon.jit
def shaped_as(buffer, descriptor):
    """A buffer in the shape (with leading ones) and the layout of a tensor descriptor's block."""
    if HAS_REINTERPRET:
        view = buffer.reinterpret(buffer.dtype, descriptor.block_type.shape, descriptor.layout)
    else:
        view = buffer._reinterpret(buffer.dtype, descriptor.block_type.shape, descriptor.layout)
    return view


@gluon.jit
def staging(ring, slot, CHUNK: gl.constexpr, LAYOUT: gl.constexpr):
    """Three blocks of BLOCK_M × CHUNK in a slot of the ring: two in the place of the weights, one in the rows'."""
    BLOCK_M: gl.constexpr = ring.a.shape[1]
    two = reshaped(ring.b.index(slot), (2, BLOCK_M, CHUNK), LAYOUT)
    one = reshaped(ring.a.index(slot), (ring.a.shape[2] // CHUNK, BLOCK_M, CHUNK), LAYOUT)
    return two.index(0), two.index(1), one.index(0)


@gluon.jit
def halves(x):
    """Left and right half of the columns, without moving data between threads."""
    ROWS: gl.constexpr = x.shape[0]
    HALF: gl.constexpr = x.shape[1] // 2
    return x.reshape((ROWS, 2, HALF)).permute((0, 2, 1)).split()


@gluon.jit
def row_halves(x):
    """Upper and lower half of the rows, without moving data between threads."""
    HALF: gl.constexpr = x.shape[0] // 2
    COLUMNS: gl.constexpr = x.shape[1]
    return x.reshape((2, HALF, COLUMNS)).permute((1, 2, 0)).split()


@gluon.jit
def ragged(first, end):
    """Leading coordinates of the row `first` in a ragged descriptor; rows from `end` on read as zeros, are not written.

    The descriptor's shape starts with [·, ·, 2³⁰] and its strides with (2³⁴ − r, r, r): address arithmetic wraps at
    2⁶⁴, so these coordinates point at `first` while the bound of the third dimension falls on `end`.
    """
    return RAGGED_ROWS, end, RAGGED_ROWS - (end - first)


@gluon.jit
def send(x, buffers, count, descriptor, coordinates):
    """Write a block by TMA through one of a few buffers, the one whose previous store is the oldest; count + 1."""
    buffer = buffers.index(count % buffers.shape[0])
    tma.store_wait(buffers.shape[0] - 1)
    partition_barrier()
    buffer.store(x.to(buffer.dtype))
    fence_async_shared()
    partition_barrier()
    tma_store(descriptor, coordinates, shaped_as(buffer, descriptor))
    return count + 1


# --- Gathered rows: up projection and hidden gradient --------------------------------------------------------------


@gluon.jit
def load_gathered(
    x, token_ids, weight, h, work, ring, K: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    CHUNK: gl.constexpr, BUFFER: gl.constexpr, UP: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Rows x[token] by asynchronous copies, weights by TMA: [E, 2, I, D] for the up projection, else [E, D, I].

    A tile's k-steps are followed by a slot for each chunk of its epilogue: it is written through there, and for the
    hidden gradient brings gate and up.
    """
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    step = gl.to_tensor(0)
    columns = gl.arange(0, BLOCK_K, gl.SliceLayout(0, ROWS))
    expert, first, end, column = work.item(gl.program_id(0))
    for item in range(gl.program_id(0), work.num_items, gl.num_programs(0)):
        next_expert, next_first, next_end, next_column = work.item(item + gl.num_programs(0))
        rows = first + gl.arange(0, work.BLOCK_M, gl.SliceLayout(1, ROWS))
        # Rows past the end are not read: any one row in their place would be asked for by all multiprocessors at once.
        exists = (rows < end)[:, None]
        tokens = gl.load(token_ids + rows, mask=rows < end, other=0)
        pointers = x + (tokens.to(gl.int64) * K)[:, None] + columns[None, :]
        if work.LAST < BLOCK_N and column == work.COLUMN_TILES - 1:
            step = load_gathered_tile(
                pointers, exists, columns, weight, h, expert, first, column * BLOCK_N, ring, step, K, work.LAST,
                work.LAST, CHUNK, BUFFER, UP
            )  # fmt: skip
        else:
            step = load_gathered_tile(
                pointers, exists, columns, weight, h, expert, first, column * BLOCK_N, ring, step, K, BLOCK_N,
                work.LAST, CHUNK, BUFFER, UP
            )  # fmt: skip
        expert, first, end, column = next_expert, next_first, next_end, next_column


@gluon.jit
def load_gathered_tile(
    pointers, exists, columns, weight, h, expert, first, column, ring, step, K: gl.constexpr, COLUMNS: gl.constexpr,
    BOX: gl.constexpr, CHUNK: gl.constexpr, BUFFER: gl.constexpr, UP: gl.constexpr
):  # fmt: skip
    BLOCK_M: gl.constexpr = ring.a.shape[1]
    BLOCK_K: gl.constexpr = ring.a.shape[2]
    SIZE: gl.constexpr = ring.a.dtype.primitive_bitwidth // 8
    for k in range(0, K, BLOCK_K):
        slot, full = ring.acquire(step)
        mbarrier.expect(full, COLUMNS * BLOCK_K * SIZE)
        load_weight(weight, expert, k, column, full, ring.b.index(slot), COLUMNS, BOX, UP, UP)
        if K % BLOCK_K == 0:
            gather_to_shared(ring.a.index(slot), pointers + k, mask=exists)
        else:
            gather_to_shared(ring.a.index(slot), pointers + k, mask=exists & (columns < K - k)[None, :])
        async_copy.mbarrier_arrive(full, increment_count=False)
        step += 1
    for c in gl.static_range(COLUMNS // (2 * CHUNK) if UP else COLUMNS // CHUNK):
        slot, full = ring.acquire(step)
        if UP:
            mbarrier.expect(full, 0)
        else:
            mbarrier.expect(full, 2 * BLOCK_M * CHUNK * SIZE)
            gate, up, _ = staging(ring, slot, CHUNK, BUFFER)
            tma_load(h, [first, 0, column + c * CHUNK], full, shaped_as(gate, h))
            tma_load(h, [first, 1, column + c * CHUNK], full, shaped_as(up, h))
        async_copy.mbarrier_arrive(full, increment_count=False)
        step += 1
    return step


@gluon.jit
def load_weight(
    weight, expert, k, column, full, buffer, COLUMNS: gl.constexpr, BOX: gl.constexpr, TRANSPOSED: gl.constexpr,
    GATED: gl.constexpr
):  # fmt: skip
    """A tile's columns into a slot, BOX of them at a time; if GATED, a box is gates and the ups that belong to them."""
    BLOCK_K: gl.constexpr = buffer.shape[1] if TRANSPOSED else buffer.shape[0]
    BOXES: gl.constexpr = (buffer.shape[0] if TRANSPOSED else buffer.shape[1]) // BOX
    SHAPE: gl.constexpr = (BOXES, BOX, BLOCK_K) if TRANSPOSED else (BOXES, BLOCK_K, BOX)
    LAYOUT: gl.constexpr = buffer.layout
    boxes = reshaped(buffer, SHAPE, LAYOUT)
    for i in gl.static_range(COLUMNS // BOX):
        box = shaped_as(boxes.index(i), weight)
        if GATED:
            tma_load(weight, [expert, 0, (column + i * BOX) // 2, k], full, box)
        elif TRANSPOSED:
            tma_load(weight, [expert, column + i * BOX, k], full, box)
        else:
            tma_load(weight, [expert, k, column + i * BOX], full, box)


@gluon.jit
def multiply_steps(
    ring, step, STEPS: gl.constexpr, COLUMNS: gl.constexpr, TRANSPOSED_B: gl.constexpr, STAGED: gl.constexpr,
    WARPS: gl.constexpr
):  # fmt: skip
    """A · B over STEPS k-steps (B [N, K] if TRANSPOSED_B), one product in flight; all slots are free after.

    If STAGED, the slot before is the last that the tile before was written through.
    """
    ACCUMULATOR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    BLOCK_M: gl.constexpr = ring.a.shape[1]
    acc = gl.zeros([BLOCK_M, COLUMNS], gl.float32, ACCUMULATOR)
    acc = multiply(ring, step, acc, COLUMNS, TRANSPOSED_B)
    if STAGED:
        tma.store_wait(0)
        partition_barrier()
        ring.release_before(step, step > 0)
    acc = warpgroup_mma_wait(1, deps=[acc])
    step += 1
    for _ in range(1, STEPS):
        acc = multiply(ring, step, acc, COLUMNS, TRANSPOSED_B)
        acc = warpgroup_mma_wait(1, deps=[acc])
        ring.release_before(step, True)
        step += 1
    acc = warpgroup_mma_wait(0, deps=[acc])
    ring.release_before(step, True)
    return acc, step


@gluon.jit
def multiply(ring, step, acc, COLUMNS: gl.constexpr, TRANSPOSED_B: gl.constexpr):
    BLOCK_K: gl.constexpr = ring.a.shape[2]
    slot = ring.wait_full(step)
    if TRANSPOSED_B:
        b = start_of(ring.b.index(slot), (COLUMNS, BLOCK_K)).permute((1, 0))
    else:
        b = start_of(ring.b.index(slot), (BLOCK_K, COLUMNS))
    return warpgroup_mma(ring.a.index(slot), b, acc, is_async=True)


@gluon.jit
def up_epilogue(
    gate, up, h, a, ring, step, first, end, column, CHUNK: gl.constexpr, BUFFER: gl.constexpr, FUNCTION: gl.constexpr,
    KEEP_HIDDEN: gl.constexpr, CONTINUED: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Write gate, up and f(gate) ⊙ up, CHUNK columns at a time."""
    if gate.shape[1] > CHUNK:
        HALF: gl.constexpr = gate.shape[1] // 2
        left_gate, right_gate = halves(gate)
        left_up, right_up = halves(up)
        step = up_epilogue(
            left_gate, left_up, h, a, ring, step, first, end, column, CHUNK, BUFFER, FUNCTION, KEEP_HIDDEN, CONTINUED,
            WARPS
        )  # fmt: skip
        step = up_epilogue(
            right_gate, right_up, h, a, ring, step, first, end, column + HALF, CHUNK, BUFFER, FUNCTION, KEEP_HIDDEN,
            True, WARPS
        )  # fmt: skip
    else:
        LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, CHUNK, 16])
        gate, up = gl.convert_layout(gate, LAYOUT), gl.convert_layout(up, LAYOUT)
        value, _ = function_and_derivative(gate, FUNCTION)
        gate_buffer, up_buffer, a_buffer = staging(ring, ring.wait_full(step), CHUNK, BUFFER)
        a_buffer.store((value * up).to(a_buffer.dtype))
        if KEEP_HIDDEN:
            gate_buffer.store(gate.to(a_buffer.dtype))
            up_buffer.store(up.to(a_buffer.dtype))
        finish_writing(ring, step, CONTINUED)
        wrap, row, below = ragged(first, end)
        tma_store(a, [wrap, row, below, column], shaped_as(a_buffer, a))
        if KEEP_HIDDEN:
            tma_store(h, [wrap, row, below, 0, column], shaped_as(gate_buffer, h))
            tma_store(h, [wrap, row, below, 1, column], shaped_as(up_buffer, h))
        step += 1
    return step


@gluon.jit
def finish_writing(ring, step, CONTINUED: gl.constexpr):
    """Let TMA see what was written to the slot of `step`; if CONTINUED, free the slot before, which it has read."""
    tma.store_wait(0)
    fence_async_shared()
    partition_barrier()
    if CONTINUED:
        ring.release_before(step, True)


@gluon.jit
def up_consumer(
    h, a, work, ring, K: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, CHUNK: gl.constexpr,
    BUFFER: gl.constexpr, FUNCTION: gl.constexpr, KEEP_HIDDEN: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    step = gl.to_tensor(0)
    for item in range(gl.program_id(0), work.num_items, gl.num_programs(0)):
        _, first, end, column = work.item(item)
        if work.LAST < BLOCK_N and column == work.COLUMN_TILES - 1:
            step = up_tile(
                h, a, ring, step, first, end, column * (BLOCK_N // 2), STEPS, work.LAST, work.LAST, CHUNK, BUFFER,
                FUNCTION, KEEP_HIDDEN, WARPS
            )  # fmt: skip
        else:
            step = up_tile(
                h, a, ring, step, first, end, column * (BLOCK_N // 2), STEPS, BLOCK_N, work.LAST, CHUNK, BUFFER,
                FUNCTION, KEEP_HIDDEN, WARPS
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def up_tile(
    h, a, ring, step, first, end, column, STEPS: gl.constexpr, COLUMNS: gl.constexpr, BOX: gl.constexpr,
    CHUNK: gl.constexpr, BUFFER: gl.constexpr, FUNCTION: gl.constexpr, KEEP_HIDDEN: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    acc, step = multiply_steps(ring, step, STEPS, COLUMNS, True, True, WARPS)
    if COLUMNS > BOX:
        left, right = halves(acc)
        gate, up = halves(left)
        step = up_epilogue(
            gate, up, h, a, ring, step, first, end, column, CHUNK, BUFFER, FUNCTION, KEEP_HIDDEN, False, WARPS
        )  # fmt: skip
        gate, up = halves(right)
        step = up_epilogue(
            gate, up, h, a, ring, step, first, end, column + BOX // 2, CHUNK, BUFFER, FUNCTION, KEEP_HIDDEN, True,
            WARPS
        )  # fmt: skip
    else:
        gate, up = halves(acc)
        step = up_epilogue(
            gate, up, h, a, ring, step, first, end, column, CHUNK, BUFFER, FUNCTION, KEEP_HIDDEN, False, WARPS
        )  # fmt: skip
    return step


@gluon.jit
def up_projection_kernel(
    x, weight, h, a, token_ids, expert_offsets, tile_experts, expert_tiles, num_experts, D: gl.constexpr,
    INNER: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, CHUNK: gl.constexpr, LOADER_WARPS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
    FUNCTION: gl.constexpr, KEEP_HIDDEN: gl.constexpr, A_LAYOUT: gl.constexpr, B_LAYOUT: gl.constexpr,
    BUFFER: gl.constexpr, num_warps: gl.constexpr
):  # fmt: skip
    """h[n] = W_gate_up,e x[token of n] and a = f(gate) ⊙ up. A column tile is BLOCK_N / 2 gates and their ups."""
    LAST: gl.constexpr = last_columns(2 * INNER, BLOCK_N)
    work = make_work(expert_offsets, tile_experts, expert_tiles, num_experts, 2 * INNER, BLOCK_M, BLOCK_N, LAST, GROUP)
    DTYPE: gl.constexpr = x.dtype.element_ty
    # A full slot is announced by the TMA and by every thread of the gather.
    ring = make_ring(DTYPE, (BLOCK_M, BLOCK_K), (BLOCK_N, BLOCK_K), A_LAYOUT, B_LAYOUT, STAGES, 1 + 32 * LOADER_WARPS)
    gl.warp_specialize(
        [
            (
                up_consumer,
                (h, a, work, ring, D, BLOCK_N, BLOCK_K, CHUNK, BUFFER, FUNCTION, KEEP_HIDDEN, num_warps),
            ),
            (
                load_gathered,
                (x, token_ids, weight, h, work, ring, D, BLOCK_N, BLOCK_K, CHUNK, BUFFER, True, LOADER_WARPS),
            ),
        ],
        [LOADER_WARPS],
        [LOADER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def hidden_epilogue(
    da, weight_M, dweight_M, dh, weighted_a, ring, step, first, end, column, CHUNK: gl.constexpr, BUFFER: gl.constexpr,
    FUNCTION: gl.constexpr, CONTINUED: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """From dA′ = dy W_down and the chunks of h that follow in the ring: dh and w a written, ⟨dA′, a⟩ added up."""
    if da.shape[1] > CHUNK:
        HALF: gl.constexpr = da.shape[1] // 2
        left, right = halves(da)
        dweight_M, step = hidden_epilogue(
            left, weight_M, dweight_M, dh, weighted_a, ring, step, first, end, column, CHUNK, BUFFER, FUNCTION,
            CONTINUED, WARPS
        )  # fmt: skip
        dweight_M, step = hidden_epilogue(
            right, weight_M, dweight_M, dh, weighted_a, ring, step, first, end, column + HALF, CHUNK, BUFFER, FUNCTION,
            True, WARPS
        )  # fmt: skip
    else:
        LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, CHUNK, 16])
        gate_buffer, up_buffer, a_buffer = staging(ring, ring.wait_full(step), CHUNK, BUFFER)
        gate, up = gate_buffer.load(LAYOUT).to(gl.float32), up_buffer.load(LAYOUT).to(gl.float32)
        partition_barrier()
        da = gl.convert_layout(da, LAYOUT)
        value, derivative = function_and_derivative(gate, FUNCTION)
        a = value * up
        dweight_M += gl.sum(da * a, 1)
        a_buffer.store((a * weight_M[:, None]).to(a_buffer.dtype))
        da = da * weight_M[:, None]
        gate_buffer.store((da * up * derivative).to(a_buffer.dtype))
        up_buffer.store((da * value).to(a_buffer.dtype))
        finish_writing(ring, step, CONTINUED)
        wrap, row, below = ragged(first, end)
        tma_store(weighted_a, [wrap, row, below, column], shaped_as(a_buffer, weighted_a))
        tma_store(dh, [wrap, row, below, 0, column], shaped_as(gate_buffer, dh))
        tma_store(dh, [wrap, row, below, 1, column], shaped_as(up_buffer, dh))
        step += 1
    return dweight_M, step


@gluon.jit
def hidden_gradient_consumer(
    weights, dh, weighted_a, dweights, num_pairs, work, ring, K: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, CHUNK: gl.constexpr, BUFFER: gl.constexpr, FUNCTION: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, CHUNK, 16])
    step = gl.to_tensor(0)
    for item in range(gl.program_id(0), work.num_items, gl.num_programs(0)):
        _, first, end, column = work.item(item)
        rows = first + gl.arange(0, work.BLOCK_M, gl.SliceLayout(1, LAYOUT))
        weight_M = gl.load(weights + rows, mask=rows < end, other=0.0).to(gl.float32)
        acc, step = multiply_steps(ring, step, (K + BLOCK_K - 1) // BLOCK_K, BLOCK_N, False, True, WARPS)
        dweight_M = gl.zeros([work.BLOCK_M], gl.float32, gl.SliceLayout(1, LAYOUT))
        dweight_M, step = hidden_epilogue(
            acc, weight_M, dweight_M, dh, weighted_a, ring, step, first, end, column * BLOCK_N, CHUNK, BUFFER,
            FUNCTION, False, WARPS
        )  # fmt: skip
        # One partial sum a row and column tile; they are added in a fixed order afterwards.
        gl.store(dweights + column.to(gl.int64) * num_pairs + rows, dweight_M, mask=rows < end)
    tma.store_wait(0)


@gluon.jit
def hidden_gradient_kernel(
    dy, weight, h, weights, dh, weighted_a, dweights, num_pairs, token_ids, expert_offsets, tile_experts, expert_tiles,
    num_experts, D: gl.constexpr, INNER: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, CHUNK: gl.constexpr, LOADER_WARPS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr, FUNCTION: gl.constexpr, A_LAYOUT: gl.constexpr, B_LAYOUT: gl.constexpr,
    BUFFER: gl.constexpr, num_warps: gl.constexpr
):  # fmt: skip
    """dA′ = dy[token] W_down,e; from it and h: dh, the weighted a and partial sums of ⟨dA′, a⟩."""
    work = make_work(expert_offsets, tile_experts, expert_tiles, num_experts, INNER, BLOCK_M, BLOCK_N, BLOCK_N, GROUP)
    DTYPE: gl.constexpr = dy.dtype.element_ty
    ring = make_ring(DTYPE, (BLOCK_M, BLOCK_K), (BLOCK_K, BLOCK_N), A_LAYOUT, B_LAYOUT, STAGES, 1 + 32 * LOADER_WARPS)
    gl.warp_specialize(
        [
            (
                hidden_gradient_consumer,
                (weights, dh, weighted_a, dweights, num_pairs, work, ring, D, BLOCK_N, BLOCK_K, CHUNK, BUFFER,
                 FUNCTION, num_warps),
            ),
            (
                load_gathered,
                (dy, token_ids, weight, h, work, ring, D, BLOCK_N, BLOCK_K, CHUNK, BUFFER, False, LOADER_WARPS),
            ),
        ],
        [LOADER_WARPS],
        [LOADER_REGISTERS],
    )  # fmt: skip


# --- Contiguous rows: down projection and input gradient -----------------------------------------------------------


@gluon.jit
def load_contiguous(
    rows, weight, work, ring, K: gl.constexpr, BLOCK_N: gl.constexpr, TRANSPOSED: gl.constexpr
):  # fmt: skip
    """Both operands by TMA; the weight is [E, K, columns], or [E, columns, K] if TRANSPOSED."""
    step = gl.to_tensor(0)
    expert, first, _, column = work.item(gl.program_id(0))
    for item in range(gl.program_id(0), work.num_items, gl.num_programs(0)):
        next_expert, next_first, _, next_column = work.item(item + gl.num_programs(0))
        if work.LAST < BLOCK_N and column == work.COLUMN_TILES - 1:
            step = load_contiguous_tile(
                rows, weight, expert, first, column * BLOCK_N, ring, step, K, work.LAST, work.LAST, TRANSPOSED
            )
        else:
            step = load_contiguous_tile(
                rows, weight, expert, first, column * BLOCK_N, ring, step, K, BLOCK_N, work.LAST, TRANSPOSED
            )
        expert, first, column = next_expert, next_first, next_column


@gluon.jit
def load_contiguous_tile(
    rows, weight, expert, first, column, ring, step, K: gl.constexpr, COLUMNS: gl.constexpr, BOX: gl.constexpr,
    TRANSPOSED: gl.constexpr
):  # fmt: skip
    BLOCK_M: gl.constexpr = ring.a.shape[1]
    BLOCK_K: gl.constexpr = ring.a.shape[2]
    for k in range(0, K, BLOCK_K):
        slot, full = ring.acquire(step)
        mbarrier.expect(full, (BLOCK_M + COLUMNS) * BLOCK_K * rows.dtype.primitive_bitwidth // 8)
        tma_load(rows, [first, k], full, ring.a.index(slot))
        load_weight(weight, expert, k, column, full, ring.b.index(slot), COLUMNS, BOX, TRANSPOSED, False)
        step += 1
    return step


@gluon.jit
def contiguous_consumer(
    out, work, ring, buffers, K: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STORE_N: gl.constexpr,
    TRANSPOSED: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    step, count = gl.to_tensor(0), gl.to_tensor(0)
    for item in range(gl.program_id(0), work.num_items, gl.num_programs(0)):
        _, first, end, column = work.item(item)
        if work.LAST < BLOCK_N and column == work.COLUMN_TILES - 1:
            step, count = contiguous_tile(
                out, ring, buffers, step, count, first, end, column * BLOCK_N, STEPS, work.LAST, STORE_N,
                TRANSPOSED, WARPS
            )  # fmt: skip
        else:
            step, count = contiguous_tile(
                out, ring, buffers, step, count, first, end, column * BLOCK_N, STEPS, BLOCK_N, STORE_N, TRANSPOSED,
                WARPS
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def contiguous_tile(
    out, ring, buffers, step, count, first, end, column, STEPS: gl.constexpr, COLUMNS: gl.constexpr,
    STORE_N: gl.constexpr, TRANSPOSED: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    acc, step = multiply_steps(ring, step, STEPS, COLUMNS, TRANSPOSED, False, WARPS)
    return step, contiguous_epilogue(acc, out, buffers, count, first, end, column, STORE_N, WARPS)


@gluon.jit
def contiguous_epilogue(
    acc, out, buffers, count, first, end, column, STORE_N: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Write a tile, STORE_N columns at a time."""
    if acc.shape[1] > STORE_N:
        left, right = halves(acc)
        count = contiguous_epilogue(left, out, buffers, count, first, end, column, STORE_N, WARPS)
        count = contiguous_epilogue(right, out, buffers, count, first, end, column + acc.shape[1] // 2, STORE_N, WARPS)
    else:
        LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, STORE_N, 16])
        wrap, row, below = ragged(first, end)
        count = send(gl.convert_layout(acc, LAYOUT), buffers, count, out, [wrap, row, below, column])
    return count


@gluon.jit
def contiguous_kernel(
    rows, weight, out, expert_offsets, tile_experts, expert_tiles, num_experts, K: gl.constexpr, COLUMNS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    STORE_N: gl.constexpr, TRANSPOSED: gl.constexpr, LOADER_REGISTERS: gl.constexpr, A_LAYOUT: gl.constexpr,
    B_LAYOUT: gl.constexpr, BUFFER: gl.constexpr, num_warps: gl.constexpr
):  # fmt: skip
    """out[n] = rows[n] · weight of n's expert."""
    LAST: gl.constexpr = last_columns(COLUMNS, BLOCK_N)
    work = make_work(expert_offsets, tile_experts, expert_tiles, num_experts, COLUMNS, BLOCK_M, BLOCK_N, LAST, GROUP)
    B_SHAPE: gl.constexpr = (BLOCK_N, BLOCK_K) if TRANSPOSED else (BLOCK_K, BLOCK_N)
    ring = make_ring(rows.dtype, (BLOCK_M, BLOCK_K), B_SHAPE, A_LAYOUT, B_LAYOUT, STAGES, 1)
    buffers = gl.allocate_shared_memory(rows.dtype, [1, BLOCK_M, STORE_N], BUFFER)
    gl.warp_specialize(
        [
            (
                contiguous_consumer,
                (out, work, ring, buffers, K, BLOCK_N, BLOCK_K, STORE_N, TRANSPOSED, num_warps),
            ),
            (
                load_contiguous,
                (rows, weight, work, ring, K, BLOCK_N, TRANSPOSED),
            ),
        ],
        [1],
        [LOADER_REGISTERS],
    )  # fmt: skip


# --- Weight gradients: one product an expert, over its rows --------------------------------------------------------


@gluon.jit
def weight_item(item, expert_offsets, GATHERED_TILES: gl.constexpr, CONTIGUOUS_TILES: gl.constexpr):
    """Expert, tile of the gathered and of the contiguous side, first row and end of the expert's rows."""
    expert = item // (GATHERED_TILES * CONTIGUOUS_TILES)
    rest = item % (GATHERED_TILES * CONTIGUOUS_TILES)
    start, end = gl.load(expert_offsets + expert), gl.load(expert_offsets + expert + 1)
    # The contiguous side, whose last tile may be half as wide, changes the slower: each program gets some of these.
    return expert, rest % GATHERED_TILES, rest // GATHERED_TILES, start, end


@gluon.jit
def load_weight_gradient(
    gathered, contiguous, token_ids, expert_offsets, num_items, ring, GATHERED: gl.constexpr, CONTIGUOUS: gl.constexpr,
    BLOCK: gl.constexpr, OTHER: gl.constexpr, BLOCK_K: gl.constexpr, GATHER_LEFT: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Rows of an expert: one side gathered by token, the other read in place; both are zero past the expert's rows."""
    TILES: gl.constexpr = (CONTIGUOUS + OTHER - 1) // OTHER
    LAST: gl.constexpr = last_columns(CONTIGUOUS, OTHER)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BLOCK, BLOCK // 8], [WARPS, 1], [1, 0])
    step = gl.to_tensor(0)
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        _, own, other, start, end = weight_item(item, expert_offsets, (GATHERED + BLOCK - 1) // BLOCK, TILES)
        columns = own * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, ROWS))
        rows = start + gl.arange(0, BLOCK_K, gl.SliceLayout(1, ROWS))
        if LAST < OTHER and other == TILES - 1:
            step = load_weight_gradient_tile(
                gathered, contiguous, token_ids, rows, columns, start, end, other * OTHER, ring, step, GATHERED, BLOCK,
                LAST, BLOCK_K, GATHER_LEFT
            )  # fmt: skip
        else:
            step = load_weight_gradient_tile(
                gathered, contiguous, token_ids, rows, columns, start, end, other * OTHER, ring, step, GATHERED, BLOCK,
                OTHER, BLOCK_K, GATHER_LEFT
            )  # fmt: skip


@gluon.jit
def load_weight_gradient_tile(
    gathered, contiguous, token_ids, rows, columns, start, end, column, ring, step, WIDTH: gl.constexpr,
    BLOCK: gl.constexpr, COLUMNS: gl.constexpr, BLOCK_K: gl.constexpr, GATHER_LEFT: gl.constexpr
):  # fmt: skip
    # Ids are fetched a step ahead of the rows they name.
    tokens = gl.load(token_ids + rows, mask=rows < end, other=0)
    for k in range(start, end, BLOCK_K):
        next_tokens = gl.load(token_ids + rows + BLOCK_K, mask=rows + BLOCK_K < end, other=0)
        slot, full = ring.acquire(step)
        mbarrier.expect(full, COLUMNS * BLOCK_K * contiguous.dtype.primitive_bitwidth // 8)
        if GATHER_LEFT:
            own_slot, other_slot = ring.a.index(slot), ring.b.index(slot)
        else:
            own_slot, other_slot = ring.b.index(slot), ring.a.index(slot)
        HALF: gl.constexpr = other_slot.shape[1] // 2
        LAYOUT: gl.constexpr = other_slot.layout
        blocks = reshaped(other_slot, (2, BLOCK_K, HALF), LAYOUT)
        wrap, row, below = ragged(k, end)
        for i in gl.static_range(COLUMNS // HALF):
            block = shaped_as(blocks.index(i), contiguous)
            tma_load(contiguous, [wrap, row, below, column + i * HALF], full, block)
        mask = (rows < end)[:, None]
        if WIDTH % BLOCK != 0:
            mask = mask & (columns < WIDTH)[None, :]
        pointers = gathered + (tokens.to(gl.int64) * WIDTH)[:, None] + columns[None, :]
        gather_to_shared(own_slot, pointers, mask=mask)
        async_copy.mbarrier_arrive(full, increment_count=False)
        tokens = next_tokens
        rows += BLOCK_K
        step += 1
    return step


@gluon.jit
def weight_gradient_consumer(
    out, expert_offsets, num_items, ring, buffers, GATHERED: gl.constexpr, CONTIGUOUS: gl.constexpr,
    BLOCK: gl.constexpr, OTHER: gl.constexpr, BLOCK_K: gl.constexpr, GATHER_LEFT: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    TILES: gl.constexpr = (CONTIGUOUS + OTHER - 1) // OTHER
    LAST: gl.constexpr = last_columns(CONTIGUOUS, OTHER)
    step, count = gl.to_tensor(0), gl.to_tensor(0)
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        expert, own, other, start, end = weight_item(item, expert_offsets, (GATHERED + BLOCK - 1) // BLOCK, TILES)
        if GATHER_LEFT:
            row, column = own * BLOCK, other * OTHER
        else:
            row, column = other * OTHER, own * BLOCK
        if LAST < OTHER and other == TILES - 1:
            step, count = weight_gradient_tile(
                out, ring, buffers, step, count, start, end, expert, row, column, BLOCK, LAST, BLOCK_K, GATHER_LEFT,
                WARPS
            )  # fmt: skip
        else:
            step, count = weight_gradient_tile(
                out, ring, buffers, step, count, start, end, expert, row, column, BLOCK, OTHER, BLOCK_K, GATHER_LEFT,
                WARPS
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def weight_gradient_tile(
    out, ring, buffers, step, count, start, end, expert, row, column, BLOCK: gl.constexpr, COLUMNS: gl.constexpr,
    BLOCK_K: gl.constexpr, GATHER_LEFT: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """BLOCK columns of the gathered side by COLUMNS of the contiguous one."""
    P: gl.constexpr = BLOCK if GATHER_LEFT else COLUMNS
    Q: gl.constexpr = COLUMNS if GATHER_LEFT else BLOCK
    acc = gl.zeros([P, Q], gl.float32, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, Q, 16]))
    for k in range(start, end, BLOCK_K):
        slot = ring.wait_full(step)
        a = start_of(ring.a.index(slot), (BLOCK_K, P)).permute((1, 0))
        acc = warpgroup_mma(a, start_of(ring.b.index(slot), (BLOCK_K, Q)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        ring.release_before(step, k > start)
        step += 1
    acc = warpgroup_mma_wait(0, deps=[acc])
    ring.release_before(step, end > start)
    return step, weight_gradient_epilogue(acc, out, buffers, count, expert, row, column, WARPS)


@gluon.jit
def weight_gradient_epilogue(acc, out, buffers, count, expert, row, column, WARPS: gl.constexpr):
    """Write a tile block by block."""
    if acc.shape[0] > buffers.shape[1]:
        upper, lower = row_halves(acc)
        count = weight_gradient_epilogue(upper, out, buffers, count, expert, row, column, WARPS)
        count = weight_gradient_epilogue(lower, out, buffers, count, expert, row + acc.shape[0] // 2, column, WARPS)
    elif acc.shape[1] > buffers.shape[2]:
        left, right = halves(acc)
        count = weight_gradient_epilogue(left, out, buffers, count, expert, row, column, WARPS)
        count = weight_gradient_epilogue(right, out, buffers, count, expert, row, column + acc.shape[1] // 2, WARPS)
    else:
        LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, acc.shape[1], 16])
        count = send(gl.convert_layout(acc, LAYOUT), buffers, count, out, [expert, row, column])
    return count


@gluon.jit
def weight_gradient_kernel(
    gathered, contiguous, out, token_ids, expert_offsets, num_experts, GATHERED: gl.constexpr, CONTIGUOUS: gl.constexpr,
    BLOCK: gl.constexpr, OTHER: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GATHER_LEFT: gl.constexpr,
    LOADER_WARPS: gl.constexpr, LOADER_REGISTERS: gl.constexpr, A_LAYOUT: gl.constexpr, B_LAYOUT: gl.constexpr,
    BUFFER: gl.constexpr, num_warps: gl.constexpr
):  # fmt: skip
    """out[e] [P, Q] = leftᵀ right over the rows of expert e; one of the two is gathered. Zeros without rows."""
    DTYPE: gl.constexpr = gathered.dtype.element_ty
    BLOCK_P: gl.constexpr = BLOCK if GATHER_LEFT else OTHER
    BLOCK_Q: gl.constexpr = OTHER if GATHER_LEFT else BLOCK
    num_items = num_experts * ((GATHERED + BLOCK - 1) // BLOCK) * ((CONTIGUOUS + OTHER - 1) // OTHER)
    ring = make_ring(DTYPE, (BLOCK_K, BLOCK_P), (BLOCK_K, BLOCK_Q), A_LAYOUT, B_LAYOUT, STAGES, 1 + 32 * LOADER_WARPS)
    buffers = gl.allocate_shared_memory(DTYPE, [1, BLOCK, OTHER // 2], BUFFER)
    gl.warp_specialize(
        [
            (
                weight_gradient_consumer,
                (out, expert_offsets, num_items, ring, buffers, GATHERED, CONTIGUOUS, BLOCK, OTHER, BLOCK_K,
                 GATHER_LEFT, num_warps),
            ),
            (
                load_weight_gradient,
                (gathered, contiguous, token_ids, expert_offsets, num_items, ring, GATHERED, CONTIGUOUS, BLOCK, OTHER,
                 BLOCK_K, GATHER_LEFT, LOADER_WARPS),
            ),
        ],
        [LOADER_WARPS],
        [LOADER_REGISTERS],
    )  # fmt: skip
