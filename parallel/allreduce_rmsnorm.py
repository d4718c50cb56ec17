"""The collectives between tensor parallel layers together with the residual add and the norm beside them.

    fused_allreduce_rmsnorm       x summed over the ranks → + residual → RMSNorm → y whole on every rank
    reduce_scatter_add_rmsnorm    the same, each rank keeping the y of its rows
    add_rmsnorm_all_gather        x of this rank's rows → + residual → RMSNorm → y whole on every rank

(TokenWeave, arXiv 2505.11329, §3, with gradients.) Each row is summed and normed by the rank that owns it, rank r of W
owning rows r·⌈T / W⌉ … of the T; the residual is only ever of a rank's own rows. In one kernel where the GPUs of the
group read one another's memory, and elsewhere by collectives and one kernel, or plain PyTorch on a CPU.

The loss is the sum of all ranks' losses (:mod:`moetrain.parallel.tensor`): the gradient of a y that is whole on every
rank is the sum of what the ranks send back, the gradient of a summand x is that of the sum. The gradient of the weight
is the part that comes from this rank's rows. For the backward pass the new residual and a number a row are kept.

Shapes: T rows on all ranks, R rows that this rank owns, D width, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moetrain.kernels import allreduce_rmsnorm_triton as kernels
from moetrain.kernels.allreduce_rmsnorm import add_rmsnorm, add_rmsnorm_backward, owned_rows
from moetrain.parallel.symmetric import Workspace, workspace
from moetrain.parallel.tensor import gathered, summed_to_shards

Group = dist.ProcessGroup | None


def fused_allreduce_rmsnorm(
    x_TD: Tensor,
    residual_RD: Tensor,
    weight_D: Tensor,
    eps: float,
    group: Group,
    *,
    blocks: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RMSNorm(Σ_ranks x + residual) of all T rows on every rank, and the new residual Σ_ranks x + residual of its own.

    Parameters
    ----------
    x_TD : [T, D], this rank's summand, floating point. Best written by its producer into :func:`symmetric_empty`
    residual_RD : [R, D], rows r·⌈T / W⌉ … of it, in any floating point dtype. The sum is rounded to it before the norm
    weight_D : [D]
    group : None is one rank
    blocks : of the fused kernel, which takes as many multiprocessors; 16 do almost what all (None) do. All ranks must
        ask for as many
    backend : "fused", "collectives", or "auto", which takes the first where it can

    Returns y [T, D] in the dtype of x, and the residual [R, D] in its own. Differentiable once in x, residual and
    weight. Collective; of a group on GPUs, all calls must come from one stream (:mod:`moetrain.parallel.symmetric`).

    Raises ValueError where shapes or devices disagree, or the backend cannot do this, and DistError if an earlier
    kernel of the group has waited for another rank in vain.
    """
    return _apply(x_TD, residual_RD, weight_D, eps, group, x_TD.shape[0], blocks, backend, reduce=True, gather=True)


def reduce_scatter_add_rmsnorm(
    x_TD: Tensor,
    residual_RD: Tensor,
    weight_D: Tensor,
    eps: float,
    group: Group,
    *,
    blocks: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As :func:`fused_allreduce_rmsnorm`, but y [R, D] is of this rank's rows alone."""
    return _apply(x_TD, residual_RD, weight_D, eps, group, x_TD.shape[0], blocks, backend, reduce=True, gather=False)


def add_rmsnorm_all_gather(
    x_RD: Tensor,
    residual_RD: Tensor,
    weight_D: Tensor,
    eps: float,
    group: Group,
    *,
    total_rows: int | None = None,
    blocks: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As :func:`fused_allreduce_rmsnorm`, but x [R, D] is of this rank's rows alone, and summed already.

    `total_rows`: T; None if every rank owns equally many.
    """
    world = 1 if group is None else group.size()
    total = world * x_RD.shape[0] if total_rows is None else total_rows
    return _apply(x_RD, residual_RD, weight_D, eps, group, total, blocks, backend, reduce=False, gather=True)


def symmetric_empty(shape: Sequence[int], dtype: torch.dtype, group: Group) -> Tensor:
    """Memory that the other ranks can read, for an x that then need not be copied; elsewhere, ordinary memory.

    There are two pieces, taken in turn, also by calls whose x or gradient of y is in ordinary memory: the second such
    call after this one overwrites it. Collective where it is larger than any before; alike on all ranks, or x must be.
    """
    if group is not None and dist.get_backend(group) == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
        space = workspace(group, device)
        return (
            space.take_slot(shape, dtype)
            if isinstance(space, Workspace)
            else torch.empty(shape, dtype=dtype, device=device)
        )
    return torch.empty(*shape, dtype=dtype)


class _Exchange(Protocol):
    """How ranks share the work on `total` rows: whether a pass begins with a sum over them, and ends with a gather."""

    def forward(
        self, x: Tensor, residual_RD: Tensor, weight_D: Tensor, eps: float, total: int, reduce: bool, gather: bool
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def backward(
        self,
        dy: Tensor,
        dresidual_RD: Tensor,
        h_RD: Tensor,
        rstd_R: Tensor,
        weight_D: Tensor,
        total: int,
        reduce: bool,
        gather: bool,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class _Fused:
    """One kernel on every rank."""

    space: Workspace
    blocks: int

    def forward(
        self, x: Tensor, residual_RD: Tensor, weight_D: Tensor, eps: float, total: int, reduce: bool, gather: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        xs, shards = self._buffers(x, total, reduce, gather)
        return kernels.forward(
            xs, shards, residual_RD, weight_D, eps, total, self.space.rank, self.blocks, self.space.meeting
        )

    def backward(
        self,
        dy: Tensor,
        dresidual_RD: Tensor,
        h_RD: Tensor,
        rstd_R: Tensor,
        weight_D: Tensor,
        total: int,
        reduce: bool,
        gather: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dys, shards = self._buffers(dy, total, reduce, gather)
        return kernels.backward(
            dys, shards, dresidual_RD, h_RD, rstd_R, weight_D, total, self.space.rank, self.blocks, self.space.meeting
        )

    def _buffers(
        self, x: Tensor, total: int, reduce: bool, gather: bool
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        space = self.space
        space.check()
        share, _ = owned_rows(total, space.world, 1)
        xs = space.shared(x, *owned_rows(total, space.world, space.rank)) if reduce else (x,)
        return xs, space.shards(share * x.shape[1], x.dtype) if gather else ()


@dataclass(frozen=True)
class _Composed:
    """Collectives, and what a rank does to its own rows."""

    group: Group

    def forward(
        self, x: Tensor, residual_RD: Tensor, weight_D: Tensor, eps: float, total: int, reduce: bool, gather: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_RD = self._own_sum(x, total) if reduce else x
        if _has_kernel(x_RD):
            y_RD, h_RD, rstd_R = kernels.forward(
                (x_RD,), (), residual_RD, weight_D, eps, len(x_RD), 0, _many_blocks(x_RD), None
            )
        else:
            y_RD, h_RD, rstd_R = add_rmsnorm((x_RD,), residual_RD, weight_D, eps)
        return self._all_rows(y_RD, total) if gather else y_RD, h_RD, rstd_R

    def backward(
        self,
        dy: Tensor,
        dresidual_RD: Tensor,
        h_RD: Tensor,
        rstd_R: Tensor,
        weight_D: Tensor,
        total: int,
        reduce: bool,
        gather: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dy_RD = self._own_sum(dy, total) if reduce else dy
        if _has_kernel(dy_RD):
            dx_RD, dh_RD, dweight_D = kernels.backward(
                (dy_RD,), (), dresidual_RD, h_RD, rstd_R, weight_D, len(dy_RD), 0, _many_blocks(dy_RD), None
            )
        else:
            dh_RD, dweight_D = add_rmsnorm_backward((dy_RD,), dresidual_RD, h_RD, rstd_R, weight_D)
            dx_RD = dh_RD.to(dy.dtype)
        return self._all_rows(dx_RD, total) if gather else dx_RD, dh_RD, dweight_D

    def _own_sum(self, x_TD: Tensor, total: int) -> Tensor:
        """Rows of equal shares are scattered; what fills up the last ones is dropped again."""
        if self.group is None:
            return x_TD
        world = self.group.size()
        _, rows = owned_rows(total, world, self.group.rank())
        return summed_to_shards(F.pad(x_TD, (0, 0, 0, -total % world)), self.group)[:rows]

    def _all_rows(self, y_RD: Tensor, total: int) -> Tensor:
        if self.group is None:
            return y_RD
        share, _ = owned_rows(total, self.group.size(), 1)
        return gathered(F.pad(y_RD, (0, 0, 0, share - len(y_RD))), self.group)[:total]


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual_RD: Tensor,
        weight_D: Tensor,
        eps: float,
        total: int,
        exchange: _Exchange,
        reduce: bool,
        gather: bool,
    ) -> tuple[Tensor, Tensor]:
        weight_D = weight_D.contiguous()
        y, h_RD, rstd_R = exchange.forward(
            x.contiguous(), residual_RD.contiguous(), weight_D, eps, total, reduce, gather
        )
        ctx.save_for_backward(h_RD, rstd_R, weight_D)
        ctx.total, ctx.exchange, ctx.reduce, ctx.gather = total, exchange, reduce, gather
        return y, h_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, dresidual_RD = (grad.contiguous() for grad in grads)
        gradients = ctx.exchange.backward(
            dy, dresidual_RD, *ctx.saved_tensors, ctx.total, reduce=ctx.gather, gather=ctx.reduce
        )
        return *gradients, None, None, None, None, None


@torch.compiler.disable
def _apply(
    x: Tensor,
    residual_RD: Tensor,
    weight_D: Tensor,
    eps: float,
    group: Group,
    total: int,
    blocks: int | None,
    backend: str,
    *,
    reduce: bool,
    gather: bool,
) -> tuple[Tensor, Tensor]:
    _check(x, residual_RD, weight_D, group, total, reduce)
    exchange = _choose(backend, x, group, blocks)
    return _AddRMSNorm.apply(x, residual_RD, weight_D, eps, total, exchange, reduce, gather)


def _choose(backend: str, x: Tensor, group: Group, blocks: int | None) -> _Exchange:
    if backend not in ("auto", "fused", "collectives"):
        raise ValueError(f"backend {backend!r}: there are auto, fused, collectives")
    if backend == "collectives":
        return _Composed(group)
    space = _workspace(x, group)
    if isinstance(space, Workspace):
        if blocks is not None and not 1 <= blocks <= space.max_blocks:
            raise ValueError(f"blocks = {blocks}: this GPU has 1 to {space.max_blocks} at once")
        return _Fused(space, blocks or space.max_blocks)
    if backend == "fused":
        raise ValueError(f"backend 'fused' {space}: use 'auto' or 'collectives'")
    return _Composed(group)


def _workspace(x: Tensor, group: Group) -> Workspace | str:
    if group is None or group.size() == 1:
        return "needs several ranks"
    if x.dtype not in kernels.DTYPES:
        return f"has no {x.dtype}"
    if x.shape[1] > kernels.MAX_WIDTH:
        return f"takes widths up to {kernels.MAX_WIDTH}, not {x.shape[1]}"
    return workspace(group, x.device)


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in kernels.DTYPES and x.shape[1] <= kernels.MAX_WIDTH


def _many_blocks(x: Tensor) -> int:
    """Nobody waits for these, so that they may be more than fit at once."""
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count


def _check(x: Tensor, residual_RD: Tensor, weight_D: Tensor, group: Group, total: int, reduce: bool) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point of two dimensions, not {list(x.shape)} {x.dtype}")
    world, rank = (1, 0) if group is None else (group.size(), group.rank())
    _, rows = owned_rows(total, world, rank)
    width = x.shape[1]
    expected = {
        "x": (x, [total if reduce else rows, width]),
        "residual": (residual_RD, [rows, width]),
        "weight": (weight_D, [width]),
    }
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; rank {rank} of {world} takes {shape} of {total} rows in all"
            )
        if tensor.device != x.device or not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, x {x.dtype} on {x.device}")
