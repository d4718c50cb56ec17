"""Grouped GEMMs in Triton: rows sorted by expert times the experts' weights, and their weight gradients.

Names: M rows of a tile, N columns of a tile, K what a product sums over, I expert width; R and C rows and columns of
any block. PARTS is 2 where a width holds a gate and an up half, else 1. Products are accumulated in float32.

Operands are pointers or, where `TMA` is set, tensor descriptors made by the host: of weights as
[E, PARTS, rows, columns], of rows as "ragged" ones of [rows, PARTS, columns], through which a program sees the rows of
one expert, zeros beyond them, and cannot write beyond them. Rows gathered by token are always read by pointer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.ragged_tma import to_ragged_indices

from moetrain.kernels.activation import function_and_derivative
from moetrain.kernels.tile_schedule import work_item


@triton.jit
def up_projection_kernel(
    x,
    weight,
    bias,
    h,
    a,
    token_ids,
    expert_offsets,
    tile_experts,
    expert_tiles,
    num_experts,
    depth,
    width,
    FUNCTION: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h = x[token] · weight[e]ᵀ + bias[e] and a = activation(h), of `width` columns. `bias` and `h` may be None.

    A gated tile computes gate and up of the same BLOCK_N / 2 columns in one product.
    """
    BLOCK_I: tl.constexpr = BLOCK_N // PARTS
    column_tiles = tl.cdiv(width, BLOCK_I)
    num_items = tl.load(expert_tiles + num_experts) * column_tiles
    for item in tl.range(tl.program_id(0), num_items, tl.num_programs(0), flatten=FLATTEN):
        expert, first, end, column_tile = work_item(
            item, num_items, expert_offsets, tile_experts, expert_tiles, column_tiles, BLOCK_M, GROUP
        )
        column = column_tile * BLOCK_I
        row_M = first + tl.arange(0, BLOCK_M)
        token_M = tl.load(token_ids + row_M, mask=row_M < end, other=0)
        h_MN = _product(
            x, token_M, row_M < end, first, depth, False,
            weight, expert, column, width, PARTS, False,
            PRECISION, EVEN_K, EVEN_N, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        left_MC, right_MC = _halves(h_MN)
        if PARTS == 2:
            gate_MC = _finish_hidden(left_MC, bias, h, expert, first, end, 0, column, width, PARTS, EVEN_N, TMA)
            up_MC = _finish_hidden(right_MC, bias, h, expert, first, end, 1, column, width, PARTS, EVEN_N, TMA)
            value_MC, _ = function_and_derivative(gate_MC, FUNCTION)
            _store_rows(a, value_MC * up_MC, first, end, 0, column, width, 1, EVEN_N, TMA)
        else:
            # In halves here too: they share the memory that a store goes through.
            middle = column + BLOCK_N // 2
            left_MC = _finish_hidden(left_MC, bias, h, expert, first, end, 0, column, width, PARTS, EVEN_N, TMA)
            left_MC, _ = function_and_derivative(left_MC, FUNCTION)
            _store_rows(a, left_MC, first, end, 0, column, width, 1, EVEN_N, TMA)
            right_MC = _finish_hidden(right_MC, bias, h, expert, first, end, 0, middle, width, PARTS, EVEN_N, TMA)
            right_MC, _ = function_and_derivative(right_MC, FUNCTION)
            _store_rows(a, right_MC, first, end, 0, middle, width, 1, EVEN_N, TMA)


@triton.jit
def linear_kernel(
    rows,
    weight,
    bias,
    out,
    expert_offsets,
    tile_experts,
    expert_tiles,
    num_experts,
    depth,
    width,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = rows · weight[e]ᵀ + bias[e], or rows · weight[e] where TRANSPOSED. `bias` may be None."""
    column_tiles = tl.cdiv(width, BLOCK_N)
    num_items = tl.load(expert_tiles + num_experts) * column_tiles
    for item in tl.range(tl.program_id(0), num_items, tl.num_programs(0), flatten=FLATTEN):
        expert, first, end, column_tile = work_item(
            item, num_items, expert_offsets, tile_experts, expert_tiles, column_tiles, BLOCK_M, GROUP
        )
        column = column_tile * BLOCK_N
        row_M = first + tl.arange(0, BLOCK_M)
        out_MN = _product(
            rows, row_M, row_M < end, first, depth, TMA,
            weight, expert, column, width, 1, TRANSPOSED,
            PRECISION, EVEN_K, EVEN_N, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if bias is not None:
            out_MN += _bias(bias, expert, column, width, EVEN_N, BLOCK_N)
        # In halves: they share the memory that a store goes through, which is worth one more stage of the pipeline.
        left_MN, right_MN = _halves(out_MN)
        _store_rows(out, left_MN, first, end, 0, column, width, 1, EVEN_N, TMA)
        _store_rows(out, right_MN, first, end, 0, column + BLOCK_N // 2, width, 1, EVEN_N, TMA)


@triton.jit
def hidden_gradient_kernel(
    dy,
    weight,
    h,
    dh,
    weighted_a,
    weights,
    dweights,
    token_ids,
    expert_offsets,
    tile_experts,
    expert_tiles,
    num_experts,
    num_rows,
    depth,
    width,
    FUNCTION: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """da = dy[token] · weight[e], and from it and h: dh, weight · a and the gradient of the weight.

    `dweights` is [column tiles, num_rows]: every tile of columns writes what its columns add, for a sum in a fixed
    order.
    """
    column_tiles = tl.cdiv(width, BLOCK_N)
    num_items = tl.load(expert_tiles + num_experts) * column_tiles
    for item in tl.range(tl.program_id(0), num_items, tl.num_programs(0), flatten=FLATTEN):
        expert, first, end, column_tile = work_item(
            item, num_items, expert_offsets, tile_experts, expert_tiles, column_tiles, BLOCK_M, GROUP
        )
        row_M = first + tl.arange(0, BLOCK_M)
        exists_M = row_M < end
        da_MN = _product(
            dy, tl.load(token_ids + row_M, mask=exists_M, other=0), exists_M, first, depth, False,
            weight, expert, column_tile * BLOCK_N, width, 1, True,
            PRECISION, EVEN_K, EVEN_N, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        weight_M = tl.load(weights + row_M, mask=exists_M, other=0.0).to(tl.float32)
        dweight_M = _hidden_gradient_columns(
            da_MN, weight_M, h, dh, weighted_a, first, end, column_tile * BLOCK_N, width,
            FUNCTION, PARTS, EVEN_N, TMA, CHUNKS,
        )  # fmt: skip
        tl.store(dweights + column_tile.to(tl.int64) * num_rows + row_M, dweight_M, mask=exists_M)


@triton.jit
def weight_gradient_kernel(
    gathered,
    rows,
    out,
    token_ids,
    expert_offsets,
    num_experts,
    gathered_width,
    rows_width,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[e] = gathered[tokens of e]ᵀ · rows[rows of e], its transpose where TRANSPOSED; zeros if e has no rows.

    Both sides are zero beyond the expert's rows: an Inf or NaN of the next expert would come through as 0 · Inf.
    """
    blocks_M = tl.cdiv(gathered_width, BLOCK_M)
    blocks_N = tl.cdiv(rows_width, BLOCK_N)
    num_tiles = num_experts * blocks_M * blocks_N
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        expert = tile // (blocks_M * blocks_N)
        column = tile % blocks_N * BLOCK_N
        m_M = tile // blocks_N % blocks_M * BLOCK_M + tl.arange(0, BLOCK_M)
        n_N = column + tl.arange(0, BLOCK_N)
        exists_M = _below(m_M, gathered_width, EVEN_M)
        exists_N = _below(n_N, rows_width, EVEN_N)
        first = tl.load(expert_offsets + expert)
        end = tl.load(expert_offsets + expert + 1)
        acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        row_K = first + tl.arange(0, BLOCK_K)
        token_K = tl.load(token_ids + row_K, mask=row_K < end, other=0)
        for row in range(first, end, BLOCK_K):
            row_K = row + tl.arange(0, BLOCK_K)
            exists_K = row_K < end
            gathered_KM = _load_block(gathered, gathered_width, token_K, exists_K, m_M, exists_M)
            if TMA:
                rows_KN = _load_ragged(rows, row, first, end, 0, column).reshape(BLOCK_K, BLOCK_N)
            else:
                rows_KN = _load_block(rows, rows_width, row_K, exists_K, n_N, exists_N)
            acc_MN = tl.dot(gathered_KM.T, rows_KN, acc_MN, input_precision=PRECISION)
            # A step ahead: a load that waits for another one is not pipelined as deeply.
            row_K += BLOCK_K
            token_K = tl.load(token_ids + row_K, mask=row_K < end, other=0)
        out_e = out + expert.to(tl.int64) * gathered_width * rows_width
        if TRANSPOSED:
            _store_block(out_e, gathered_width, acc_MN.T, n_N, exists_N, m_M, exists_M)
        else:
            _store_block(out_e, rows_width, acc_MN, m_M, exists_M, n_N, exists_N)


@triton.jit
def _product(
    rows,
    row_M,
    exists_M,
    first,
    depth,
    ROWS_TMA: tl.constexpr,
    weight,
    expert,
    column,
    width,
    PARTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """rows[row_M] · weight[expert]ᵀ at the columns from `column` on, those of the two halves beside each other.

    Only rows that exist are read: any one row in place of the others would be asked for by all multiprocessors at once.
    Where ROWS_TMA the rows are those from `first` on, through a descriptor that is not ragged: what is read of the next
    expert's rows is not written.
    """
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        if ROWS_TMA:
            rows_MK = rows.load([first, k])
        else:
            k_K = k + tl.arange(0, BLOCK_K)
            rows_MK = _load_block(rows, depth, row_M, exists_M, k_K, _below(k_K, depth, EVEN_K))
        weight_KN = _load_weight(
            weight, expert, k, depth, column, width, PARTS, TRANSPOSED, EVEN_K, EVEN_N, TMA, BLOCK_K, BLOCK_N
        )
        acc_MN = tl.dot(rows_MK, weight_KN, acc_MN, input_precision=PRECISION)
    return acc_MN


@triton.jit
def _load_weight(
    weight,
    expert,
    k,
    depth,
    column,
    width,
    PARTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Block [BLOCK_K, BLOCK_N] of weight[expert]ᵀ, stored [PARTS, width, depth], or where TRANSPOSED [depth, width]."""
    k_K = k + tl.arange(0, BLOCK_K)
    n_N = tl.arange(0, BLOCK_N)
    if TRANSPOSED:
        if TMA:
            weight_KN = weight.load([expert, 0, k, column]).reshape(BLOCK_K, BLOCK_N)
        else:
            column_N = column + n_N
            weight_KN = _load_block(
                weight + expert.to(tl.int64) * depth * width, width,
                k_K, _below(k_K, depth, EVEN_K), column_N, _below(column_N, width, EVEN_N),
            )  # fmt: skip
    else:
        if TMA:
            weight_NK = weight.load([expert, 0, column, k]).reshape(BLOCK_N, BLOCK_K)
        else:
            column_N = column + n_N % (BLOCK_N // PARTS)
            weight_NK = _load_block(
                weight + expert.to(tl.int64) * depth * width * PARTS, depth,
                n_N // (BLOCK_N // PARTS) * width + column_N, _below(column_N, width, EVEN_N),
                k_K, _below(k_K, depth, EVEN_K),
            )  # fmt: skip
        weight_KN = weight_NK.T
    return weight_KN


@triton.jit
def _bias(bias, row, column, width, EVEN: tl.constexpr, BLOCK_C: tl.constexpr):
    column_C = column + tl.arange(0, BLOCK_C)
    bias_C = tl.load(bias + row * width + column_C, mask=_below(column_C, width, EVEN), other=0.0)
    return bias_C.to(tl.float32)[None, :]


@triton.jit
def _finish_hidden(
    h_MC,
    bias,
    h,
    expert,
    first,
    end,
    part,
    column,
    width,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """Adds the bias to a block of one part of h and writes it, each if there is one."""
    if bias is not None:
        h_MC += _bias(bias, expert * PARTS + part, column, width, EVEN, h_MC.shape[1])
    if h is not None:
        _store_rows(h, h_MC, first, end, part, column, width, PARTS, EVEN, TMA)
    return h_MC


@triton.jit
def _hidden_gradient_columns(
    da_MC,
    weight_M,
    h,
    dh,
    weighted_a,
    first,
    end,
    column,
    width,
    FUNCTION: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Writes a block of dh and of weight · a, and returns the sums of da · a over its columns.

    One chunk of the columns after the other: all at once they do not fit the registers.
    """
    if CHUNKS > 1:
        left_MC, right_MC = _halves(da_MC)
        middle = column + da_MC.shape[1] // 2
        dweight_M = _hidden_gradient_columns(
            left_MC, weight_M, h, dh, weighted_a, first, end, column, width, FUNCTION, PARTS, EVEN, TMA, CHUNKS // 2
        )
        dweight_M += _hidden_gradient_columns(
            right_MC, weight_M, h, dh, weighted_a, first, end, middle, width, FUNCTION, PARTS, EVEN, TMA, CHUNKS // 2
        )
    else:
        gate_MC, up_MC = _load_hidden(h, first, end, column, width, PARTS, EVEN, TMA, da_MC.shape[0], da_MC.shape[1])
        value_MC, derivative_MC = function_and_derivative(gate_MC, FUNCTION)
        if PARTS == 2:
            a_MC = value_MC * up_MC
            derivative_MC *= up_MC
        else:
            a_MC = value_MC
        dweight_M = tl.sum(da_MC * a_MC, 1)
        da_MC *= weight_M[:, None]
        _store_rows(weighted_a, a_MC * weight_M[:, None], first, end, 0, column, width, 1, EVEN, TMA)
        _store_rows(dh, da_MC * derivative_MC, first, end, 0, column, width, PARTS, EVEN, TMA)
        if PARTS == 2:
            _store_rows(dh, da_MC * value_MC, first, end, 1, column, width, PARTS, EVEN, TMA)
    return dweight_M


@triton.jit
def _load_hidden(
    h,
    first,
    end,
    column,
    width,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gate and up of a block of h, from row `first` on, in float32; of a plain h, which has no halves, twice the same.

    By TMA both come at once: nothing else is done while they are waited for.
    """
    if TMA:
        h_RPC = _load_ragged(h, first, first, end, 0, column).reshape(BLOCK_R, PARTS, BLOCK_C)
        if PARTS == 2:
            gate_RC, up_RC = tl.split(tl.permute(h_RPC, (0, 2, 1)))
        else:
            gate_RC = h_RPC.reshape(BLOCK_R, BLOCK_C)
            up_RC = gate_RC
    else:
        row_R = first + tl.arange(0, BLOCK_R)
        column_C = column + tl.arange(0, BLOCK_C)
        exists_C = _below(column_C, width, EVEN)
        gate_RC = _load_block(h, PARTS * width, row_R, row_R < end, column_C, exists_C)
        up_RC = _load_block(h + (PARTS - 1) * width, PARTS * width, row_R, row_R < end, column_C, exists_C)
    return gate_RC.to(tl.float32), up_RC.to(tl.float32)


@triton.jit
def _store_rows(
    rows,
    value_RC,
    first,
    end,
    part,
    column,
    width,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """Writes a block to one part of rows [*, PARTS, width], from row `first` on and none at or behind `end`."""
    BLOCK_R: tl.constexpr = value_RC.shape[0]
    BLOCK_C: tl.constexpr = value_RC.shape[1]
    if TMA:
        c0, c1, c2 = to_ragged_indices(first, end - first, 0)
        rows.store([c0, c1, c2, part, column], value_RC.to(rows.dtype).reshape(1, 1, BLOCK_R, 1, BLOCK_C))
    else:
        row_R = first + tl.arange(0, BLOCK_R)
        column_C = column + tl.arange(0, BLOCK_C)
        _store_block(
            rows + part * width, PARTS * width, value_RC, row_R, row_R < end, column_C, _below(column_C, width, EVEN)
        )


@triton.jit
def _load_ragged(rows, row, first, end, part, column):
    """Block [1, 1, R, PARTS, C] from `row` and `part` on, through a ragged descriptor; zeros beyond `end`."""
    c0, c1, c2 = to_ragged_indices(first, end - first, row - first)
    return rows.load([c0, c1, c2, part, column])


@triton.jit
def _load_block(pointer, stride, row_R, exists_R, column_C, exists_C):
    pointer_RC = pointer + row_R.to(tl.int64)[:, None] * stride + column_C[None, :]
    return tl.load(pointer_RC, mask=exists_R[:, None] & exists_C[None, :], other=0.0)


@triton.jit
def _store_block(pointer, stride, value_RC, row_R, exists_R, column_C, exists_C):
    pointer_RC = pointer + row_R.to(tl.int64)[:, None] * stride + column_C[None, :]
    tl.store(pointer_RC, value_RC.to(pointer.dtype.element_ty), mask=exists_R[:, None] & exists_C[None, :])


@triton.jit
def _below(index, limit, EVEN: tl.constexpr):
    """index < limit; where EVEN says that it always holds a constant, with which the compiler drops the mask."""
    return tl.full(index.shape, True, tl.int1) if EVEN else index < limit


@triton.jit
def _halves(block_RC):
    """Left and right half of the columns, without moving data between threads."""
    half: tl.constexpr = block_RC.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(block_RC, (block_RC.shape[0], 2, half)), (0, 2, 1)))
