"""The row tiles of a grouped GEMM, made on the device: which expert and which rows each tile computes.

Shapes: E experts, N pairs (rows, sorted by expert), M tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetrain.kernels.routing import Routing

MAX_BLOCK_E = 1024
"""Experts that are counted at once; more of them are walked in blocks."""


@dataclass(frozen=True)
class TileSchedule:
    """Tiles of `rows_per_tile` rows in the order of the rows; no tile crosses from one expert to another.

    Tile m, of expert e = tile_experts_M[m], is the expert's tile number i = m − expert_tiles[e] and computes the rows
    from expert_offsets[e] + i · rows_per_tile up to, and without, the next tile's or expert_offsets[e + 1].
    An expert without rows has no tile. Only the first expert_tiles[E] entries of tile_experts_M exist (how many, the
    host never learns); the rest are not written.
    """

    tile_experts_M: Tensor
    """int32 [max_tiles], the expert of each tile."""
    expert_tiles: Tensor
    """int32 [E + 1], the number of tiles before those of each expert; the last entry is the number of all."""
    rows_per_tile: int

    @property
    def max_tiles(self) -> int:
        """What the host knows: no routing of N rows to E experts has more than N // rows_per_tile + E tiles."""
        return self.tile_experts_M.numel()


def tile_schedule(routing: Routing, rows_per_tile: int) -> TileSchedule:
    """Cuts the rows of every expert into tiles, with one small kernel and no wait for the device.

    Kept with the routing, so that the stages which walk it share one schedule. Raises ValueError where `rows_per_tile`
    is not positive.
    """
    schedules: dict[int, TileSchedule] = routing.__dict__.setdefault("_tile_schedules", {})
    if rows_per_tile in schedules:
        return schedules[rows_per_tile]
    schedules[rows_per_tile] = schedule = _empty_schedule(routing, rows_per_tile)
    experts = routing.num_experts
    _tile_schedule_kernel[(experts,)](
        routing.expert_offsets,
        schedule.tile_experts_M,
        schedule.expert_tiles,
        experts,
        ROWS_PER_TILE=rows_per_tile,
        BLOCK_E=min(triton.next_power_of_2(experts), MAX_BLOCK_E),
        BLOCK_M=64,
        num_warps=1 if experts <= 256 else 4,
    )
    return schedule


def tile_schedule_reference(routing: Routing, rows_per_tile: int) -> TileSchedule:
    """The twin of :func:`tile_schedule` in plain PyTorch, for any device; entries past expert_tiles[E] are zero."""
    schedule = _empty_schedule(routing, rows_per_tile)
    ends_E = ((routing.counts_E + rows_per_tile - 1) // rows_per_tile).cumsum(0)
    tile_M = torch.arange(schedule.max_tiles, device=ends_E.device)
    expert_M = torch.searchsorted(ends_E, tile_M, right=True).clamp(max=routing.num_experts - 1)
    schedule.tile_experts_M.copy_(expert_M * (tile_M < ends_E[-1]))
    schedule.expert_tiles[0] = 0
    schedule.expert_tiles[1:] = ends_E
    return schedule


def _empty_schedule(routing: Routing, rows_per_tile: int) -> TileSchedule:
    if rows_per_tile < 1:
        raise ValueError(f"a tile needs at least one row, not {rows_per_tile}")
    # Every expert has floor(rows / rows_per_tile) full tiles and at most one that is not full.
    max_tiles = routing.num_pairs // rows_per_tile + routing.num_experts
    empty = routing.expert_offsets.new_empty(max_tiles + routing.num_experts + 1)
    return TileSchedule(empty[:max_tiles], empty[max_tiles:], rows_per_tile)


@triton.jit
def work_item(
    index,
    num_items,
    expert_offsets,
    tile_experts,
    expert_tiles,
    column_tiles,
    ROWS_PER_TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Expert, first row, end of the expert's rows and column tile of a work item: row tiles × column tiles.

    Up to GROUP row tiles of an expert take turns before the next column: what runs at the same time then shares
    blocks of the weight as well as rows, and the L2 cache reads both once. Items from `num_items` on may be asked for
    and are of no use, so that a loop can look ahead.
    """
    expert = tl.load(tile_experts + index // column_tiles, mask=index < num_items, other=0)
    first_tile = tl.load(expert_tiles + expert)
    num_tiles = tl.load(expert_tiles + expert + 1) - first_tile
    index -= first_tile * column_tiles
    group = index // (GROUP * column_tiles) * GROUP
    index -= group * column_tiles
    group_tiles = tl.maximum(tl.minimum(num_tiles - group, GROUP), 1)
    row = tl.load(expert_offsets + expert) + (group + index % group_tiles) * ROWS_PER_TILE
    return expert, row, tl.load(expert_offsets + expert + 1), index // group_tiles


@triton.jit
def _tile_schedule_kernel(
    expert_offsets,
    tile_experts,
    expert_tiles,
    num_experts,
    ROWS_PER_TILE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program an expert: counts the tiles of the experts before it, then writes its own."""
    expert = tl.program_id(0)
    before = 0
    total = 0
    for block in range(0, num_experts, BLOCK_E):
        expert_E = block + tl.arange(0, BLOCK_E)
        exists_E = expert_E < num_experts
        first_E = tl.load(expert_offsets + expert_E, mask=exists_E, other=0)
        end_E = tl.load(expert_offsets + expert_E + 1, mask=exists_E, other=0)
        tiles_E = (end_E - first_E + ROWS_PER_TILE - 1) // ROWS_PER_TILE
        before += tl.sum(tl.where(expert_E < expert, tiles_E, 0))
        total += tl.sum(tiles_E)
    tl.store(expert_tiles + expert, before)
    if expert == 0:
        tl.store(expert_tiles + num_experts, total)
    rows = tl.load(expert_offsets + expert + 1) - tl.load(expert_offsets + expert)
    tiles = (rows + ROWS_PER_TILE - 1) // ROWS_PER_TILE
    for block in range(0, tiles, BLOCK_M):
        tile_M = block + tl.arange(0, BLOCK_M)
        tl.store(tile_experts + before + tile_M, tl.zeros_like(tile_M) + expert, mask=tile_M < tiles)
