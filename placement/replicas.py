"""EPLB, DeepSeek's expert-parallelism load balancer: replicas of hot experts, and packing of them onto nodes and GPUs.

After github.com/deepseek-ai/EPLB (described in DeepSeek-V3, arXiv 2412.19437, section 3.4), written anew; it gives the
same placements. With as many slots as experts it makes an ordinary placement: :func:`eplb`.

Replicas are for load analysis and for inference. In training every replica of an expert would get the gradient of the
tokens it has seen alone, so before each optimiser step the gradients would have to be summed over the ranks that hold
the expert's replicas (and the norm count the expert once), or the replicas would part; a placement with replicas also
holds some experts twice on a rank's memory budget, moments and all. The trainer does neither, so it takes placements
without replicas only: a :class:`ReplicatedPlacement` is no :class:`Placement` and has no file.

Shapes: L MoE layers, E experts, S slots (S / G on each GPU), G GPUs, R groups of experts, N nodes, X items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetrain.errors import PlacementError
from moetrain.placement.load import pack_lpt
from moetrain.placement.placement import Assignment


@dataclass(frozen=True, eq=False)
class ReplicatedPlacement:
    """Which expert is in each slot; the slots of GPU g are those from g·S/G to (g + 1)·S/G − 1."""

    expert_LS: NDArray[np.int64]
    num_experts: int
    num_gpus: int

    @property
    def replicas_LE(self) -> NDArray[np.int64]:
        """[L, E]: how many slots have the expert, at least 1."""
        return np.stack([np.bincount(expert_S, minlength=self.num_experts) for expert_S in self.expert_LS])

    def load_LG(self, load_LE: NDArray[np.floating]) -> NDArray[np.float64]:
        """[L, G]: the load of each GPU where an expert's tokens are shared evenly by its replicas."""
        share_LE = load_LE / self.replicas_LE
        load_LS = np.take_along_axis(share_LE, self.expert_LS, axis=1)
        return load_LS.reshape(len(load_LS), self.num_gpus, -1).sum(axis=2)


def eplb(load_LE: NDArray[np.floating], num_gpus: int, num_nodes: int = 1, num_groups: int = 1) -> Assignment:
    """EPLB without replicas, an assignment [L, E] of E / G experts to each GPU: see :func:`replicate_and_pack`."""
    num_layers, num_experts = load_LE.shape
    placement = replicate_and_pack(load_LE, num_experts, num_gpus, num_nodes, num_groups)
    gpu_S = np.arange(num_experts, dtype=np.int64) // (num_experts // num_gpus)
    gpu_LE = np.empty((num_layers, num_experts), np.int64)
    np.put_along_axis(gpu_LE, placement.expert_LS, gpu_S[None], axis=1)
    return gpu_LE


def replicate_and_pack(
    load_LE: NDArray[np.floating], num_slots: int, num_gpus: int, num_nodes: int = 1, num_groups: int = 1
) -> ReplicatedPlacement:
    """EPLB: S − E replicas for the experts with the most load a replica, and all onto GPUs, heaviest first.

    Where N divides R, groups of E / R consecutive experts (of group-limited routing) are first packed onto nodes, R / N
    each, and every node replicates and packs its own: the hierarchical policy. Otherwise groups and nodes count for
    nothing: the global one. Raises PlacementError where the numbers do not divide as they must.
    """
    num_layers, num_experts = load_LE.shape
    if num_groups % num_nodes:
        num_nodes = num_groups = 1
    for number, parts, what in (
        (num_experts, num_groups, "experts cannot be split into groups of the same size: groups"),
        (num_gpus, num_nodes, "GPUs cannot be shared evenly by nodes"),
        (num_slots, num_gpus, "slots (experts and replicas) cannot be shared evenly by GPUs"),
    ):
        if number % parts:
            raise PlacementError(f"{number} {what}: {parts}")
    if num_slots < num_experts:
        raise PlacementError(f"{num_slots} slots are fewer than the {num_experts} experts")

    # Experts in the order of their nodes, groups in the order in which their node got them.
    load_LRX = load_LE.reshape(num_layers, num_groups, -1)
    group_LR = _pack_in_order(load_LRX.sum(axis=2), num_nodes)
    group_size = num_experts // num_groups
    expert_LE = (group_LR[:, :, None] * group_size + np.arange(group_size)).reshape(num_layers, num_experts)

    # From here on each (layer, node) is a problem of its own.
    load_XE = np.take_along_axis(load_LE, expert_LE, axis=1).reshape(num_layers * num_nodes, -1)
    local_XS, replicas_XE = _replicate(load_XE, num_slots // num_nodes)
    load_XS = np.take_along_axis(load_XE / replicas_XE, local_XS, axis=1)
    slot_XS = _pack_in_order(load_XS, num_gpus // num_nodes)
    local_XS = np.take_along_axis(local_XS, slot_XS, axis=1)

    expert_XE = expert_LE.reshape(num_layers * num_nodes, -1)
    expert_LS = np.take_along_axis(expert_XE, local_XS, axis=1).reshape(num_layers, num_slots)
    return ReplicatedPlacement(expert_LS, num_experts, num_gpus)


def _replicate(load_XE: NDArray[np.floating], num_slots: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The expert of each of S slots [X, S], first every expert once, and the slots of each expert [X, E]."""
    rows, num_experts = load_XE.shape
    expert_XS = np.tile(np.arange(num_slots, dtype=np.int64), (rows, 1))
    replicas_XE = np.ones(load_XE.shape, np.int64)
    for slot in range(num_experts, num_slots):
        hottest_X = (load_XE / replicas_XE).argmax(axis=1)
        expert_XS[:, slot] = hottest_X
        replicas_XE[np.arange(rows), hottest_X] += 1
    return expert_XS, replicas_XE


def _pack_in_order(load_LX: NDArray[np.floating], packs: int) -> NDArray[np.int64]:
    """[L, X]: the items of pack 0, then those of pack 1, … each in the order in which LPT put them there.

    One item a pack stays where it is, as in EPLB.
    """
    num_layers, items = load_LX.shape
    if items == packs:
        return np.tile(np.arange(items, dtype=np.int64), (num_layers, 1))
    pack_LX = pack_lpt(load_LX, packs, items // packs, items // packs)
    heaviest_first_LX = np.argsort(-load_LX, axis=1, kind="stable")
    by_pack_LX = np.take_along_axis(pack_LX, heaviest_first_LX, axis=1).argsort(axis=1, kind="stable")
    return np.take_along_axis(heaviest_first_LX, by_pack_LX, axis=1)
