"""Gradient reduction over replicas, and the global norm.

Every rank's loss is its share of the global mean, so gradients are summed, never averaged: over the ranks that hold the
same part of a parameter (an expert's other tokens came by all-to-all already).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moetrain.parallel.sharding import Sharding

BUCKET_BYTES = 64 * 2**20


def reduce_gradients(parameters: Mapping[nn.Parameter, Sharding]) -> None:
    """Sum gradients over the ranks that hold the same parameters, in place; a missing gradient counts as zero."""
    for sharding, members in _groups(parameters):
        if sharding.replica_group is not None:
            _all_reduce(_gradients(members), sharding.replica_group)


def gradient_norm(parameters: Mapping[nn.Parameter, Sharding], device: torch.device) -> Tensor:
    """2-norm of the whole model's gradient, the same on every rank: float32 (or wider) 0-D tensor on `device`.

    Call after :func:`reduce_gradients`. A NaN or Inf on any rank makes it NaN or Inf on every rank.
    """
    total = torch.zeros((), device=device)
    for sharding, members in _groups(parameters):
        squared = _squared_norm([p.grad for p in members if p.grad is not None], device)
        if sharding.shard_group is not None:
            dist.all_reduce(squared, group=sharding.shard_group)
        total = total + squared
    return total.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], norm: float, max_norm: float) -> None:
    """Scale gradients by min(1, max_norm / norm), in place.

    `norm` is a number: a float32 tensor as factor would take torch the slow way through gradients of another dtype.
    """
    # The same small constant as torch.nn.utils.clip_grad_norm_.
    factor = max_norm / (norm + 1e-6)
    if factor < 1:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)


def _groups(parameters: Mapping[nn.Parameter, Sharding]) -> list[tuple[Sharding, list[nn.Parameter]]]:
    """Parameters that are split and replicated over the same ranks, whatever the dimension."""
    groups: dict[tuple[DeviceMesh, bool, bool], tuple[Sharding, list[nn.Parameter]]] = {}
    for parameter, sharding in parameters.items():
        key = sharding.mesh, sharding.dim is None, sharding.fsdp_dim is None
        groups.setdefault(key, (sharding, []))[1].append(parameter)
    return list(groups.values())


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    return gradients


def _squared_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), device=device)
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=wide)).square().sum()


def _all_reduce(gradients: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum each gradient over the group, many small ones in one collective."""
    bucket: list[Tensor] = []
    filled = 0
    for gradient in gradients:
        bucket.append(gradient)
        filled += gradient.numel() * gradient.element_size()
        if filled >= BUCKET_BYTES:
            _all_reduce_bucket(bucket, group)
            bucket, filled = [], 0
    if bucket:
        _all_reduce_bucket(bucket, group)


def _all_reduce_bucket(bucket: list[Tensor], group: dist.ProcessGroup) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.all_reduce(bucket[0], group=group)
        return
    flat = torch.cat([gradient.flatten() for gradient in bucket])
    dist.all_reduce(flat, group=group)
    pieces = flat.split([gradient.numel() for gradient in bucket])
    torch._foreach_copy_(bucket, [piece.view_as(g) for piece, g in zip(pieces, bucket, strict=True)])
