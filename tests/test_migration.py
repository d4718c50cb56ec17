"""Experts that change places: every number arrives, only what must travels, and as many bytes as predicted."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from comparison import whole_tensors as together
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor

from moetrain.parallel import ExpertSlots, Sharding, create_mesh, destroy_mesh
from moetrain.parallel.migration import ExpertTensor, migrate, migration_bytes, migration_seconds, slots_after
from moetrain.parallel.mock import MockWorld
from moetrain.placement.placement import Placement
from moetrain.placement.topology import Topology

EXPERTS = 8
SHAPES = ((EXPERTS, 8, 3), (EXPERTS, 4, 2))
"""Of two weights, logical; each comes with two moments."""


def whole_tensors(layer: int) -> list[Tensor]:
    """Every number is another one."""
    generator = torch.Generator().manual_seed(layer)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES for _ in range(3)]


def move_and_check(ep: int, fsdp_dim: int | None, before_LE: list[list[int]], after_LE: list[list[int]]) -> list[int]:
    """Migrate on every rank; returns what each sent, and what was predicted that it would."""
    mesh = create_mesh(ep=ep, device="cpu")
    layers, shardings = [], []
    for layer, slots in enumerate(before_LE):
        sharding = Sharding(mesh.experts, 0, fsdp_dim, ExpertSlots(slots))
        shardings.append(sharding)
        layers.append([ExpertTensor(sharding.part(whole).clone(), sharding) for whole in whole_tensors(layer)])
    predicted_LPP = migration_bytes(layers, after_LE)
    sent = migrate(layers, after_LE)
    for layer, (sharding, slots) in enumerate(zip(shardings, after_LE, strict=True)):
        assert sharding.slots is not None
        assert sharding.slots.slots == slots == sharding.slots.slot_E.tolist()
        for tensor, whole in zip(layers[layer], whole_tensors(layer), strict=True):
            assert torch.equal(tensor.rows, sharding.part(whole))
    destroy_mesh()
    return [sent, int(predicted_LPP.sum((0, 2))[mesh.rank])]


@pytest.mark.parametrize(("ep", "ranks"), [(1, 1), (2, 2), (4, 4), (2, 4), (2, 8)])
@pytest.mark.parametrize("fsdp_dim", [None, 0, 1])
def test_any_slots(ep: int, ranks: int, fsdp_dim: int | None) -> None:
    """Also such that experts change their slots on their rank."""
    rng = np.random.default_rng(ranks)
    before_LE, after_LE = (rng.permuted(np.tile(range(EXPERTS), (3, 1)), axis=1).tolist() for _ in range(2))
    for sent, predicted in MockWorld(ranks).run(move_and_check, ep, fsdp_dim, before_LE, after_LE):
        assert sent == predicted


def put_together(ep: int, fsdp_dim: int | None, slots: list[int]) -> None:
    """The ranks' parts, as a checkpoint sees them, are the logical tensor."""
    mesh = create_mesh(ep=ep, device="cpu")
    sharding = Sharding(mesh.experts, 0, fsdp_dim, ExpertSlots(slots))
    wholes = dict(enumerate(whole_tensors(0)))
    logical = {str(key): sharding.logical(sharding.part(whole), whole.shape) for key, whole in wholes.items()}
    for key, whole in together(logical).items():
        assert torch.equal(whole, wholes[int(key)])
    destroy_mesh()


@pytest.mark.parametrize(("ep", "ranks"), [(2, 4), (2, 8), (1, 4)])
@pytest.mark.parametrize("fsdp_dim", [None, 0, 1])
def test_parts_of_logical_tensors(ep: int, ranks: int, fsdp_dim: int | None) -> None:
    MockWorld(ranks).run(put_together, ep, fsdp_dim, [4, 5, 0, 7, 2, 3, 1, 6])


def test_bytes_of_the_experts_that_change_their_rank() -> None:
    """One expert is 3 · (8·3 + 4·2) float64 numbers, on each rank that holds it, and in all where FSDP splits it."""
    before = list(range(EXPERTS))
    after = slots_after(before, [0, 0, 1, 0, 1, 1, 0, 1], 2)  # 2 and 6 change places
    assert after == [0, 1, 6, 3, 4, 5, 2, 7]
    assert slots_after([3, 2, 1, 0], [0, 0, 1, 1], 2) == [0, 1, 2, 3]  # free slots in order of the experts
    expert = 3 * (8 * 3 + 4 * 2) * 8
    for fsdp_dim, copies in ((None, 2), (0, 1), (1, 1)):
        ranks = MockWorld(4).run(move_and_check, 2, fsdp_dim, [before], [after])
        assert sum(sent for sent, _ in ranks) == 2 * copies * expert
    assert MockWorld(2).run(move_and_check, 2, None, [before], [before]) == [[0, 0], [0, 0]]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 4), st.randoms(use_true_random=False))
def test_who_stays_keeps_its_slot(gpus: int, share: int, random: object) -> None:
    slots, gpu_E = list(range(gpus * share)), [gpu for gpu in range(gpus) for _ in range(share)]
    random.shuffle(slots)  # type: ignore[attr-defined]
    random.shuffle(gpu_E)  # type: ignore[attr-defined]
    after = slots_after(slots, gpu_E, gpus)
    assert sorted(after) == list(range(gpus * share))
    for old, new, gpu in zip(slots, after, gpu_E, strict=True):
        assert new // share == gpu
        assert new == old or old // share != gpu


def test_the_time_of_the_busiest() -> None:
    bytes_LPP = np.zeros((2, 3, 3), np.int64)
    bytes_LPP[0, 0, 1:] = 100  # rank 0 sends 200
    bytes_LPP[1, :2, 2] = 50  # rank 2 receives 100
    assert migration_seconds(bytes_LPP, np.full((3, 3), 0.01)) == pytest.approx(3.0)


def test_no_more_memory_than_what_travels_of_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange, extra = dist.all_to_all_single, []

    def watched(incoming: Tensor, outgoing: Tensor, *others: Any, **more: Any) -> None:
        extra.append((incoming.shape, outgoing.shape))
        exchange(incoming, outgoing, *others, **more)

    monkeypatch.setattr(dist, "all_to_all_single", watched)
    before, after = [list(range(EXPERTS))] * 2, [[4, 5, 6, 7, 0, 1, 2, 3], [0, 1, 2, 4, 3, 5, 6, 7]]
    MockWorld(2).run(move_and_check, 2, None, before, after)
    rows = Counter((incoming[0], outgoing[0]) for incoming, outgoing in extra)
    assert rows == {(4, 4): 2 * 6, (1, 1): 2 * 6}  # 2 ranks, 6 tensors; one exchange each


def test_two_processes() -> None:
    run_ranks(2, move_and_check, 1, 0, [[*range(EXPERTS)]], [[4, 0, 6, 3, 1, 5, 2, 7]])


def on_two_gpus() -> None:
    """64 experts of width 1024 at D = 2048 in four layers, in float32 with both moments, to a random placement."""
    mesh = create_mesh(ep=2)
    experts, num_layers = 64, 4
    layers = []
    for _ in range(num_layers):
        sharding = Sharding(mesh.experts, 0, None, ExpertSlots(range(experts), mesh.device))
        numbers = torch.arange(experts, device=mesh.device, dtype=torch.float32)[:, None, None]
        wholes = [numbers.expand(experts, *shape) for shape in ((2048, 2048), (2048, 1024)) for _ in range(3)]
        layers.append([ExpertTensor(sharding.part(whole).contiguous(), sharding) for whole in wholes])
    contiguous = Placement.contiguous(num_layers, experts, 2)
    gpu_LE = np.random.default_rng(0).permuted(contiguous.gpu_LE, axis=1)
    slots_LE = [slots_after(range(experts), gpu_E, 2) for gpu_E in gpu_LE.tolist()]
    bytes_LPP = migration_bytes(layers, slots_LE)
    predicted = migration_seconds(bytes_LPP, Topology.uniform(2).seconds_per_byte_GG)

    warm = torch.ones(2, device=mesh.device)
    dist.all_to_all_single(torch.empty_like(warm), warm, group=mesh.ep_group)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    start = time.perf_counter()
    sent = migrate(layers, slots_LE)
    torch.cuda.synchronize()
    taken = time.perf_counter() - start
    extra = torch.cuda.max_memory_allocated() - held
    assert sent == bytes_LPP.sum((0, 2))[mesh.rank]
    assert extra <= 2 * layers[0][0].rows.numel() * 4 + 2**20
    for tensors in layers:
        slots = tensors[0].sharding.slots
        assert slots is not None
        mine = torch.tensor(slots.experts[mesh.rank * 32 : mesh.rank * 32 + 32], device=mesh.device)
        for tensor in tensors:
            assert torch.equal(tensor.rows[:, 0, 0], mine.float())
            assert torch.equal(tensor.rows[:, -1, -1], mine.float())
    if mesh.rank == 0:
        moved = int((gpu_LE != contiguous.gpu_LE).sum())
        print(
            f"\n{moved} of {gpu_LE.size} experts, {bytes_LPP.sum() / 2**30:.3f} GiB predicted, in {taken:.4f} s, "
            f"predicted {predicted:.4f} s; extra memory {extra / 2**20:.0f} MiB of {held / 2**20:.0f} MiB"
        )


@pytest.mark.gpu2
def test_two_gpus() -> None:
    run_ranks(2, on_two_gpus)
