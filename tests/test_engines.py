"""Engines beyond what tests/test_mock.py compares: uneven shards, tensor parallelism, DeepSpeed, checkpoints."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_mock import compare, config_of, train, whole_tensors
from torch import Tensor, nn

from moetrain.config import OptimConfig
from moetrain.engine import create_engine
from moetrain.model import Decoder
from moetrain.optim import build_optimizer
from moetrain.parallel import Mesh, Sharding, create_mesh, destroy_mesh
from moetrain.parallel.engines import Engine, FsdpEngine, ReplicatedEngine, Unit
from moetrain.parallel.mock import MockWorld


def shard_shapes(overrides: list[str]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """By parameter: logical shape, shape of what the optimiser holds of it here."""
    config = config_of(Path(), Path(), *overrides)
    mesh = create_mesh(ep=config.parallel.ep, device="cpu")
    model = Decoder(config, mesh)
    model.initialize(0)
    whole = dict(Decoder(config).named_parameters())
    engine = create_engine(config, mesh, model)
    assert isinstance(engine, FsdpEngine)
    destroy_mesh()
    return {name: (tuple(whole[name].shape), tuple(p.shape)) for name, p in engine.parameters.items()}


UNEVEN = ["parallel.fsdp=true", "model.num_experts=4", "model.shared_gate=true", "model.vocab_size=258"]


def test_fsdp_holds_shards_of_dense_weights_over_dp_and_of_experts_over_edp() -> None:
    shapes = MockWorld(8).run(shard_shapes, [*UNEVEN, "parallel.ep=2"])[7]
    assert shapes["blocks.0.attention.wq.weight"] == ((16, 16), (2, 16))
    assert shapes["embedding"] == ((258, 16), (27, 16))  # seven times 33
    assert shapes["blocks.1.ffn.shared.gate.weight"] == ((1, 16), (0, 16))
    # Two experts of each rank among four: split by their rows.
    assert shapes["blocks.1.ffn.experts.w_gate_up"] == ((4, 32, 16), (2, 8, 16))
    assert shapes["blocks.1.ffn.experts.w_down"] == ((4, 16, 16), (2, 4, 16))
    shapes = MockWorld(8).run(shard_shapes, ["parallel.fsdp=true", "parallel.ep=4"])[0]
    assert shapes["blocks.1.ffn.experts.w_gate_up"] == ((8, 32, 16), (1, 32, 16))


def test_fsdp_trains_uneven_shards(tmp_path: Path, data_folder: Path) -> None:
    one, eight = (
        config_of(tmp_path / name, data_folder, *UNEVEN, *overrides)
        for name, overrides in (
            ("one", ["parallel.fsdp=false", "train.micro_batch=32"]),
            ("eight", ["parallel.ep=2", "train.micro_batch=4"]),
        )
    )
    compare(MockWorld(8).run(train, eight), MockWorld(1).run(train, one)[0])


# Tensor parallel parameters ------------------------------------------------------------------------------------------


class Network(nn.Module):
    """row · (column · (x ⊙ norm)), of which a tensor parallel rank computes the part of its hidden units."""

    def __init__(self, norm: Tensor, column: Tensor, row: Tensor) -> None:
        super().__init__()
        self.norm, self.column, self.row = (nn.Parameter(part.clone()) for part in (norm, column, row))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.norm) @ self.column.t() @ self.row.t()


def steps_of(engine: Engine, model: nn.Module, samples: list[Tensor]) -> tuple[list[float], dict[str, Tensor]]:
    """Gradient norms of three steps of two micro-batches, and the whole tensors after them."""
    norms = []
    for _ in range(3):
        for x, factor in zip(samples, (1.0, -0.3), strict=True):
            engine.backward((model(x) * factor).sum())
        norms.append(engine.step(0.1))
    return norms, whole_tensors(engine.tensors())


def train_network(tp: int, fsdp: bool) -> tuple[list[float], dict[str, Tensor]]:
    mesh: Mesh = create_mesh(tp=tp, device="cpu")
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, dtype=torch.float64, generator=generator) for s in ((6,), (8, 6), (5, 8))]
    samples = [torch.randn(12, 6, dtype=torch.float64, generator=generator) for _ in range(2)]
    shardings = dict(zip(("norm", "column", "row"), (Sharding(mesh.dense, dim) for dim in (None, 0, 1)), strict=True))
    model = Network(*(sharding.part(weight) for sharding, weight in zip(shardings.values(), weights, strict=True)))
    optimizer = partial(build_optimizer, config=OptimConfig())
    engine: Engine = (
        FsdpEngine(model, [Unit(model, None, reshard_after_forward=False)], shardings, optimizer, clip_norm=3.0)
        if fsdp
        else ReplicatedEngine(dict(model.named_parameters()), shardings, optimizer, clip_norm=3.0)
    )
    result = steps_of(engine, model, [x.chunk(mesh.dp)[mesh.dp_rank] for x in samples])
    for name, sharding in shardings.items():
        # What `part` cuts out of the logical tensor is what the optimiser holds.
        if fsdp:
            sharding = Sharding(sharding.mesh, sharding.dim, fsdp_dim=0)
        assert torch.equal(sharding.part(result[1][f"model.{name}"]), engine.parameters[name])  # type: ignore[attr-defined]
    dist.barrier()
    destroy_mesh()
    return result


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize(("ranks", "tp"), [(2, 2), (4, 2), (8, 2), (8, 4)])
def test_parameters_split_over_tp_or_alike_there(ranks: int, tp: int, fsdp: bool) -> None:
    """The alike ones' gradients are parts of a sum over tp, and every element counts once in the norm."""
    norms, state = MockWorld(1).run(train_network, 1, False)[0]
    assert max(norms) > 3  # clipping is at work
    for there, tensors in MockWorld(ranks).run(train_network, tp, fsdp):
        assert there == pytest.approx(norms, rel=1e-12)
        for name, tensor in tensors.items():
            assert float((tensor - state[name]).norm()) <= 1e-12 * float(state[name].norm()), name
