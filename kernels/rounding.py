"""Token rounding (SonicMoE, arXiv 2512.14080, Algorithm 4): an expert's tokens become a multiple of the kernel's tile.

A grouped product works in tiles of rows, and an expert's last tile is mostly padding where experts are many and small.
Token rounding drops the expert's weakest pairs, or adds the best tokens that just missed it, until its last tile is
full. docs/routing.md says what is the paper's, what is ours, and what it costs. The capacity limit is here as well: it
selects in the same way.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "up", "down", "balanced"]

TILE = 128
"""A multiple of the rows of every kernel's tile: experts with multiples of it leave no tile partly empty."""


def round_tokens(
    chosen_TE: Tensor, weights_TE: Tensor, tile: int, rounding: Rounding, allowed_TE: Tensor | None = None
) -> Tensor:
    """The pairs after rounding, bool [T, E] (expert-major in memory).

    `chosen_TE` bool: what top-k chose. `weights_TE` float [T, E]: what ranks an expert's tokens, of chosen and other
    ones. `allowed_TE` bool: pairs that may be added (group-limited choice), all by default; it includes the chosen.

    The definition is two sorts: the tokens of an expert in the order (chosen first, larger weight first, earlier token
    first), of which the first :func:`rounded_counts` stay. So an added token never takes the place of a chosen one, and
    an expert changes by less than one tile. NaN counts as the smallest weight, so that the counts and with them
    :func:`most_pairs` hold whatever a router gone wrong says.

    Nothing waits for the device, and equal input gives equal output on every device: float32 weights on a GPU take the
    kernels of rounding_triton.py, others plain PyTorch. Raises ValueError for a tile below 1, an unknown rounding, or
    shapes that differ.
    """
    if chosen_TE.shape != weights_TE.shape or (allowed_TE is not None and allowed_TE.shape != chosen_TE.shape):
        raise ValueError(
            f"chosen {list(chosen_TE.shape)}, weights {list(weights_TE.shape)} and allowed must have one shape"
        )
    if _most_changed(tile, rounding) == 0 or chosen_TE.numel() == 0:
        return chosen_TE
    if chosen_TE.is_cuda and weights_TE.dtype == torch.float32 and importlib.util.find_spec("triton"):
        from moetrain.kernels import rounding_triton

        return rounding_triton.round_tokens(chosen_TE, weights_TE, tile, rounding, allowed_TE)
    return round_tokens_twin(chosen_TE, weights_TE, tile, rounding, allowed_TE)


def round_tokens_twin(
    chosen_TE: Tensor, weights_TE: Tensor, tile: int, rounding: Rounding, allowed_TE: Tensor | None = None
) -> Tensor:
    """The same in plain torch; T ≥ 1, E ≥ 1, and a tile that leaves something to round."""
    chosen_ET = chosen_TE.t().contiguous()
    candidates_ET = ~chosen_ET if allowed_TE is None else allowed_TE.t() & ~chosen_ET
    counts_E = chosen_ET.sum(1)
    change_E = rounded_counts(counts_E, counts_E + candidates_ET.sum(1), tile, rounding) - counts_E
    drops_E1 = change_E[:, None] < 0

    # Only the border moves, and by at most `most` pairs: the pairs to flip are the smallest of the chosen, or the
    # largest of the others.
    most = min(_most_changed(tile, rounding), chosen_TE.shape[0])
    weights_ET = weights_TE.detach().t()
    weights_ET = weights_ET.masked_fill(weights_ET.isnan(), -torch.inf)
    keys_ET = torch.where(drops_E1, -weights_ET, weights_ET)
    may_flip_ET = torch.where(drops_E1, chosen_ET, candidates_ET)
    return chosen_ET.logical_xor(_largest(keys_ET, may_flip_ET, change_E.abs(), most, latest_E1=drops_E1)).t()


def keep_largest(chosen_TE: Tensor, weights_TE: Tensor, limit: int) -> Tensor:
    """Of each expert's pairs those with the `limit` largest weights, bool [T, E]; among equal ones the first tokens."""
    if limit >= chosen_TE.shape[0]:
        return chosen_TE
    chosen_ET = chosen_TE.t().contiguous()
    kept_E = chosen_ET.sum(1).clamp_max(limit)
    first_E1 = torch.zeros_like(kept_E, dtype=torch.bool)[:, None]
    return _largest(weights_TE.detach().t(), chosen_ET, kept_E, limit, latest_E1=first_E1).t()


def rounded_counts(counts_E: Tensor, room_E: Tensor, tile: int, rounding: Rounding) -> Tensor:
    """Tokens of each expert after rounding, int64 [E], from its tokens before and the most that it could have.

    - `nearest` (the paper's NR-f): up where the next multiple is nearer, ⌈f⌉ − f < f − ⌊f⌋, down otherwise.
    - `up`, `down`: always so.
    - `balanced` (Balance-f): expert by expert, whichever of both keeps the sum of all changes so far nearest to 0. That
      sum is then within tile/2, so the sum of the new counts up to any expert is the sum of the old ones, rounded to
      the nearest multiple (halves down): no loop is needed.

    An expert that would get more than `room_E` gets that many: its last tile stays partly empty.
    """
    counts_E, room_E = counts_E.to(torch.int64), room_E.to(torch.int64)
    if rounding == "balanced":
        sums_E = _nearest(counts_E.cumsum(0), tile)
        rounded_E = torch.cat([sums_E[:1], sums_E.diff()])
    elif rounding == "nearest":
        rounded_E = _nearest(counts_E, tile)
    else:
        rounded_E = (counts_E + (tile - 1 if rounding == "up" else 0)) // tile * tile
    return rounded_E.minimum(room_E)


def most_pairs(num_tokens: int, top_k: int, num_experts: int, tile: int, rounding: Rounding) -> int:
    """A bound on the pairs after rounding T · K of them, whatever was chosen."""
    gained = {
        "nearest": (tile - 1) // 2 * num_experts,
        "up": (tile - 1) * num_experts,
        "down": 0,
        "balanced": (tile - 1) // 2,
    }[rounding]
    return min(num_tokens * top_k + gained, num_tokens * num_experts)


def _most_changed(tile: int, rounding: Rounding) -> int:
    """Pairs that one expert can gain or lose."""
    if tile < 1:
        raise ValueError(f"tile is {tile}, must be at least 1")
    if rounding not in ("nearest", "up", "down", "balanced"):
        raise ValueError(f"rounding {rounding!r}: there are nearest, up, down and balanced")
    return tile // 2 if rounding == "nearest" else tile - 1


def _nearest(counts_E: Tensor, tile: int) -> Tensor:
    """The nearest multiple of the tile; halves go down."""
    return (counts_E + (tile - 1) // 2) // tile * tile


def _largest(keys_EX: Tensor, among_EX: Tensor, count_E: Tensor, most: int, *, latest_E1: Tensor) -> Tensor:
    """The `count_E` (≤ `most`) largest keys `among` a row, bool; of equal ones the first, or the last of `latest_E1`.

    From the sorted values of top-k alone, because in which order top-k returns equal ones is not specified.
    """
    keys_EX = keys_EX.masked_fill(~among_EX, -torch.inf)
    values = keys_EX.topk(most, dim=1).values
    border_E1 = values.gather(1, (count_E[:, None] - 1).clamp_min(0))
    # A key may be −inf itself.
    above_EX, equal_EX = keys_EX > border_E1, (keys_EX == border_E1) & among_EX
    ranks_EX = equal_EX.cumsum(1, dtype=torch.int32)
    needed_E1 = count_E[:, None] - above_EX.sum(1, keepdim=True)
    taken_EX = torch.where(latest_E1, ranks_EX > ranks_EX[:, -1:] - needed_E1, ranks_EX <= needed_E1)
    return above_EX | (equal_EX & taken_EX)
