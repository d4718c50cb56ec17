"""Engines beyond what test_topologies.py compares: uneven shards, tensor parallelism, bad steps, checkpoints."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from comparison import Differences, config_of, differences, train, whole_tensors
from ranks import free_port, run_ranks
from test_trainer import make_config, metrics
from torch import Tensor, nn

from moetrain import trainer
from moetrain.config import OptimConfig, from_dict
from moetrain.engine import create_engine
from moetrain.model import Decoder
from moetrain.optim import build_optimizer
from moetrain.parallel import Mesh, Sharding, create_mesh, destroy_mesh
from moetrain.parallel.engines import Engine, FsdpEngine, ReplicatedEngine, Unit
from moetrain.parallel.mock import MockWorld
from moetrain.placement.placement import Placement, save_placement
from moetrain.trainer import Trainer


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
    found = differences(MockWorld(8).run(train, eight), MockWorld(1).run(train, one)[0])
    assert found.within(Differences(*[1e-10] * 5))


# Tensor parallel parameters ------------------------------------------------------------------------------------------


class Network(nn.Module):
    """row · (column · (x ⊙ norm)), of which a tensor parallel rank computes the part of its hidden units."""

    def __init__(self, norm: Tensor, column: Tensor, row: Tensor) -> None:
        super().__init__()
        self.norm, self.column, self.row = (nn.Parameter(part.clone()) for part in (norm, column, row))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.norm) @ self.column.t() @ self.row.t()


def steps_of(engine: Engine, samples: list[Tensor]) -> tuple[list[float], dict[str, Tensor]]:
    """Gradient norms of three steps of two micro-batches, and the whole tensors after them."""
    norms = []
    for _ in range(3):
        for x, factor in zip(samples, (1.0, -0.3), strict=True):
            engine.backward((engine.forward(x) * factor).sum())
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
        else ReplicatedEngine(model, dict(model.named_parameters()), shardings, optimizer, clip_norm=3.0)
    )
    result = steps_of(engine, [x.chunk(mesh.dp)[mesh.dp_rank] for x in samples])
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


# Real ranks ----------------------------------------------------------------------------------------------------------

STEPS, BAD_STEP = 6, 3
DEEPSPEED = "parallel.engine=deepspeed"


def train_in_ranks(values: dict[str, Any], runs: list[list[str]], ports: list[int], bad_step: int = 0) -> None:
    """One process of two: a run for each list of overrides, with a NaN in the gradients of its `bad_step`."""
    original = Trainer._accumulate_gradients

    def poison(self: Trainer, batches: Any) -> Any:
        backward, bad = self.engine.backward, self.progress.step + 1 == bad_step
        self.engine.backward = lambda loss: backward(loss * math.nan if bad else loss)  # type: ignore[method-assign]
        result = original(self, batches)
        self.engine.backward = backward  # type: ignore[method-assign]
        return result

    Trainer._accumulate_gradients = poison  # type: ignore[method-assign]
    for overrides, port in zip(runs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        trainer.train(from_dict(values, overrides))


def small(folder: Path, data: Path, *overrides: str) -> dict[str, Any]:
    """Four micro-batches a step on each of two ranks, every norm clipped."""
    settings = [f"train.steps={STEPS}", "train.micro_batch=2", "optim.clip_norm=0.5", "router.balance_scope=sequence"]
    return dataclasses.asdict(make_config(folder, data, *settings, "checkpoint.every=0", "eval.every=0", *overrides))


def run_two(values: dict[str, Any], *runs: list[str], bad_step: int = 0) -> None:
    run_ranks(2, train_in_ranks, values, list(runs), [free_port() for _ in runs], bad_step)


def assert_same_course(there: Path, here: Path, relative: float, steps: int | None = None) -> None:
    assert list(metrics(there)) == list(metrics(here))
    for step, record in list(metrics(there).items())[:steps]:
        for key in ("loss_metrics/global_avg_loss", "grad_norm", "bad_steps", "heldout/loss"):
            expected = metrics(here)[step].get(key)
            if key == "grad_norm" and step == BAD_STEP:
                assert (record[key], expected) == (None, None)
            elif expected is not None:
                assert record[key] == pytest.approx(expected, rel=relative), (step, key)


def test_fsdp_compiled(tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile captures between FSDP's hooks; generating code for it would take most of a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    overrides = ["model.n_layers=1", "train.steps=2", "train.micro_batch=8", "model.shared_dim=0"]
    for name, engine in (("plain", []), ("fsdp", ["parallel.fsdp=true", "train.compile=true"])):
        trainer.train(make_config(tmp_path / name, data_folder, *overrides, *engine))
    assert_same_course(tmp_path / "fsdp", tmp_path / "plain", 1e-5)


def test_a_bad_step_is_skipped(tmp_path: Path, data_folder: Path) -> None:
    """By every engine, with clipping and accumulation."""
    values = small(tmp_path, data_folder, "parallel.ep=2")
    fsdp = [f"run.dir={tmp_path / 'fsdp'}", "parallel.fsdp=true"]
    run_two(values, [f"run.dir={tmp_path / 'plain'}"], fsdp, bad_step=BAD_STEP)
    for stage in (1, 2):
        zero = [f"run.dir={tmp_path / f'zero-{stage}'}", DEEPSPEED, f"parallel.zero_stage={stage}"]
        run_two(values, zero, bad_step=BAD_STEP)
    assert min(record["grad_norm"] or 1.0 for record in metrics(tmp_path / "plain").values()) > 0.5
    for engine in ("fsdp", "zero-1", "zero-2"):
        assert_same_course(tmp_path / engine, tmp_path / "plain", 1e-5)


def test_bfloat16(tmp_path: Path, data_folder: Path) -> None:
    """FSDP rounds before the journey what the layers round after it; DeepSpeed rounds all weights."""
    values = small(tmp_path, data_folder, "train.dtype=bfloat16", "parallel.ep=2")
    fsdp = [f"run.dir={tmp_path / 'fsdp'}", "parallel.fsdp=true"]
    run_two(values, [f"run.dir={tmp_path / 'torch'}"], fsdp, bad_step=BAD_STEP)
    # Later than in the second step a last bit of the norm may have tipped the rounding of a weight.
    assert_same_course(tmp_path / "fsdp", tmp_path / "torch", 5e-6, steps=2)
    assert_same_course(tmp_path / "fsdp", tmp_path / "torch", 1e-3)
    run_two(values, [f"run.dir={tmp_path / 'deepspeed'}", DEEPSPEED], bad_step=BAD_STEP)
    assert_same_course(tmp_path / "deepspeed", tmp_path / "torch", 5e-3)


def test_a_run_goes_on_under_any_engine(tmp_path: Path, data_folder: Path) -> None:
    """Plain, FSDP, DeepSpeed (experts placed) and plain again, each from the checkpoint of the one before."""
    values = small(tmp_path, data_folder, "optim.schedule=constant")
    folder = f"run.dir={tmp_path / 'run'}"
    run_two(
        values,
        [f"run.dir={tmp_path / 'whole'}", "train.steps=8"],
        [folder, "train.steps=2"],
        [folder, "train.steps=4", "parallel.fsdp=true", "parallel.ep=2"],
    )
    placement = tmp_path / "placement.json"
    save_placement(placement, Placement(np.array([[0, 1, 0, 1], [1, 0, 0, 1]]), 2))
    run_two(values, [folder, "train.steps=6", DEEPSPEED, "parallel.ep=2", f"placement.file={placement}"])
    run_two(values, [folder, "train.steps=8", "parallel.ep=2"])
    recorded = metrics(tmp_path / "run")
    assert list(recorded) == list(range(1, 9))
    for step, record in metrics(tmp_path / "whole").items():
        for key in ("loss_metrics/global_avg_loss", "grad_norm"):
            assert recorded[step][key] == pytest.approx(record[key], rel=1e-5), (step, key)


def restore_what_was_saved() -> None:
    """In one process of two: bfloat16 weights, float32 ones and moments come back bit for bit from logical tensors."""
    overrides = [DEEPSPEED, "parallel.ep=2", "train.dtype=bfloat16", "train.param_dtype=float32", *UNEVEN[1:]]
    config = config_of(Path(), Path(), *overrides)
    mesh = create_mesh(ep=2, device="cpu")
    model = Decoder(config, mesh)
    model.initialize(0)
    fresh = {name: weight.clone() for name, weight in model.named_parameters()}
    engine = create_engine(config, mesh, model)
    tensors = whole_tensors(engine.tensors())
    for name, weight in fresh.items():  # not rounded to bfloat16
        assert torch.equal(model.sharding(name).part(tensors[f"model.{name}"]), weight), name
    tokens = torch.randint(0, 258, (2, 16), generator=torch.Generator().manual_seed(mesh.rank))
    for _ in range(config.accumulation_steps(mesh.dp)):
        hidden, _ = engine.forward(tokens)
        engine.backward(hidden.float().square().mean() + model.cross_entropy(hidden, tokens) / 512)
    assert engine.step(0.1) > 0
    logical = {name: tensor.clone() for name, tensor in engine.tensors().items()}
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    expected = whole_tensors(logical)
    assert {float(tensor) for name, tensor in expected.items() if name.startswith("optim.step.")} == {1.0}
    engine.restore({name: torch.zeros_like(tensor) for name, tensor in logical.items()})
    assert not any(tensor.any() for tensor in whole_tensors(engine.tensors()).values())
    engine.restore(logical)
    for name, tensor in whole_tensors(engine.tensors()).items():
        assert torch.equal(tensor, expected[name]), name
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, weights[name]), name
        whole = expected[f"model.{name}"]
        assert torch.equal(model.sharding(name).part(whole).bfloat16(), weight), name


def test_zero_restores_what_it_saved() -> None:
    run_ranks(2, restore_what_was_saved)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_deepspeed_from_the_command_line(tmp_path: Path, data_folder: Path, launcher: str) -> None:
    settings = ["train.steps=2", "data.seq_len=32", "train.tokens_per_step=512", "eval.tokens=512", "metrics.every=1"]
    settings += ["model.dim=32", "model.n_layers=1", "model.expert_dim=32"]
    settings += [f"run.dir={tmp_path / 'run'}", f"data.path={data_folder}", "run.device=cpu", "parallel.ep=2"]
    command = [sys.executable, "-m", "moetrain", "train", "tiny", "--nproc", "2", "--launcher", launcher]
    result = subprocess.run([*command, DEEPSPEED, *settings], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert list(metrics(tmp_path / "run")) == [1, 2]
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
