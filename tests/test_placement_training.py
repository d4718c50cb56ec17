"""Training with a placement: the same numbers wherever the experts are or go, and checkpoints that do not know it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_mock import Numbers, compare, config_of, train
from test_trainer import metrics
from torch import Tensor

from moetrain import rebalance
from moetrain.checkpoint import contents, load, read_manifest, verify
from moetrain.checkpoint_commands import info_command
from moetrain.config import Config, from_dict
from moetrain.errors import ConfigError, PlacementError
from moetrain.parallel import create_mesh, destroy_mesh, migration
from moetrain.parallel.mock import MockWorld, RankError
from moetrain.placement.placement import Placement, save_placement
from moetrain.plan import make_plan
from moetrain.trainer import Trainer

LAYERS, EXPERTS = 2, 8


def random_placement(num_gpus: int, seed: int = 0) -> Placement:
    """E / G experts of each layer on each GPU."""
    gpu_LE = Placement.contiguous(LAYERS, EXPERTS, num_gpus).gpu_LE
    return Placement(np.random.default_rng(seed).permuted(gpu_LE, axis=1), num_gpus)


def placement_file(folder: Path, num_gpus: int, seed: int = 0) -> str:
    path = folder / f"placement-{num_gpus}-{seed}.json"
    save_placement(path, random_placement(num_gpus, seed))
    return f"placement.file={path}"


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Numbers:
    return MockWorld(1).run(train, config_of(tmp_path_factory.mktemp("one"), data_folder, "train.micro_batch=32"))[0]


@pytest.mark.parametrize(
    ("ep", "ranks", "overrides"),
    [
        (2, 2, []),
        (2, 4, ["parallel.fsdp=true"]),
        (4, 4, ["train.activation_checkpointing.mode=full"]),
        (2, 8, ["parallel.fsdp=true"]),
        (2, 4, ["parallel.tp=2", "train.activation_checkpointing.mode=selective"]),
    ],
)
def test_a_placement_changes_no_number(
    tmp_path: Path, data_folder: Path, one_rank: Numbers, ep: int, ranks: int, overrides: list[str]
) -> None:
    micro_batch = f"train.micro_batch={32 // ranks}"
    placed = [f"parallel.ep={ep}", placement_file(tmp_path, ep), micro_batch, *overrides]
    compare(MockWorld(ranks).run(train, config_of(tmp_path / "run", data_folder, *placed)), one_rank)


@pytest.mark.parametrize("routing", ["router.rounding=nearest", "router.capacity_factor=1.1"])
def test_routing_knows_nothing_of_a_placement(tmp_path: Path, data_folder: Path, routing: str) -> None:
    """Every metric of the routing is the same, to the last bit at first; the losses are as good as that."""
    common = ["parallel.ep=2", "train.micro_batch=16", "router.bias_update_rate=0", routing]
    runs = {"plain": [], "placed": [placement_file(tmp_path, 2)]}
    numbers = {
        name: MockWorld(2).run(train, config_of(tmp_path / name, data_folder, *common, *more))
        for name, more in runs.items()
    }
    compare(numbers["placed"], numbers["plain"][0])
    plain, placed = (metrics(tmp_path / name) for name in runs)
    assert plain[1]["moe/dropped_tokens"] > 0
    for step, values in plain.items():
        for name, value in values.items():
            if name.startswith("moe/") and name != "moe/dispatch_bytes":
                assert placed[step][name] == pytest.approx(value, rel=1e-10), (step, name)


# Moving on the way ---------------------------------------------------------------------------------------------------

SKEWED = ["router.bias_update_rate=1e-30", "router.balance_weight=0"]
REBALANCE = [*SKEWED, "placement.rebalance.every=2", "placement.rebalance.min_gain=0.01"]


def skew(trainer: Trainer) -> None:
    """The first experts of each layer get more than their share."""
    for router in trainer.model.routers():
        router.bias += torch.linspace(0.5, 0, EXPERTS)


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Numbers:
    config = config_of(tmp_path_factory.mktemp("skewed"), data_folder, "train.micro_batch=32", *SKEWED)
    return MockWorld(1).run(train, config, skew)[0]


@pytest.mark.parametrize(
    ("ep", "ranks", "overrides"),
    [
        (2, 2, []),
        (4, 4, []),
        (2, 4, ["parallel.fsdp=true"]),
        (2, 8, ["parallel.fsdp=true", "model.expert_dim=24"]),
    ],
)
def test_experts_that_move_change_no_number(
    tmp_path: Path, data_folder: Path, skewed: Numbers, ep: int, ranks: int, overrides: list[str]
) -> None:
    common = [f"train.micro_batch={32 // ranks}", f"parallel.ep={ep}", *overrides]
    expected = skewed
    if "model.expert_dim=24" in overrides:
        still = config_of(tmp_path / "still", data_folder, *common, *SKEWED)
        expected = MockWorld(ranks).run(train, still, skew)[0]
    config = config_of(tmp_path / "run", data_folder, *common, *REBALANCE)
    compare(MockWorld(ranks).run(train, config, skew), expected)
    seen = metrics(tmp_path / "run")
    # Looked for after step 2, and taken up after step 4: the next one is shared better.
    assert [step for step, values in seen.items() if values.get("placement/moved_experts")] == [5]
    assert seen[4]["placement/rank_load"] == pytest.approx(seen[3]["placement/rank_load"], rel=0.1)
    assert seen[5]["placement/rank_load"] == pytest.approx(
        seen[4]["placement/rank_load"] * (1 - seen[5]["placement/gain"]), rel=0.1
    )


def fail_at_the_third_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange, calls = migration._exchange, [0, 0]

    def failing(*arguments: Any) -> int:
        rank = torch.distributed.get_rank()
        calls[rank] += 1
        if rank == 1 and calls[rank] == 3:
            raise RuntimeError("the network is gone")
        return exchange(*arguments)

    monkeypatch.setattr(migration, "_exchange", failing)


def test_a_move_that_fails_ends_the_run_and_leaves_the_checkpoint(
    tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at_the_third_tensor(monkeypatch)
    config = config_of(tmp_path, data_folder, "parallel.ep=2", "train.micro_batch=16", *REBALANCE, "checkpoint.every=3")
    with pytest.raises(RankError, match="the network is gone"):
        MockWorld(2, timeout=5).run(run, config)
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert saved.name == "step-00000003"
    assert verify(saved) == []


def test_what_does_not_pay_is_left(
    tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["parallel.ep=2", "train.micro_batch=16", *REBALANCE, "metrics.console=plain", "eval.tokens=16"]
    MockWorld(2).run(run, config_of(tmp_path / "a", data_folder, *settings, "placement.rebalance.min_gain=0.9"))
    assert "less than placement.rebalance.min_gain = 90.0%" in capsys.readouterr().out
    monkeypatch.setattr(rebalance, "LoadTerm", len)  # which takes no float64 array
    MockWorld(2).run(run, config_of(tmp_path / "b", data_folder, *settings))
    out = capsys.readouterr().out
    assert "experts stay where they are: the search for a placement failed: " in out
    for name in ("a", "b"):
        assert not any("placement/moved_experts" in values for values in metrics(tmp_path / name).values())


def test_real_ranks_move_experts(tmp_path: Path, data_folder: Path) -> None:
    common = ["parallel.ep=2", "train.micro_batch=16"]
    for name, settings in (("still", SKEWED), ("moving", REBALANCE)):
        run_ranks(2, train_skewed, config_of(tmp_path / name, data_folder, *common, *settings))
    still, moving = (metrics(tmp_path / name) for name in ("still", "moving"))
    assert moving[5]["placement/moved_experts"] > 0
    for step, values in still.items():
        for name in ("loss_metrics/global_avg_loss", "grad_norm"):
            assert moving[step][name] == pytest.approx(values[name], rel=1e-10)


def train_skewed(config: Config) -> None:
    train(config, skew)


# Checkpoints ---------------------------------------------------------------------------------------------------------


def run(config: Config, prepare: Any = None) -> None:
    mesh = create_mesh(tp=config.parallel.tp, ep=config.parallel.ep, device="cpu")
    trainer = Trainer(config, mesh)
    if prepare is not None:
        prepare(trainer)
    trainer.run()
    destroy_mesh()


def tensors_of(path: Path) -> dict[str, Tensor]:
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in contents(path).items()}
    load(path, tensors)
    return tensors


RESUMES = [
    # ranks, ep, seed of the placement (None: none), overrides
    (2, 2, 1, []),  # another placement
    (2, 2, None, []),
    (1, 1, None, []),
    (4, 4, 0, []),
    (4, 2, 0, ["parallel.fsdp=true"]),
    (8, 2, 2, ["parallel.fsdp=true"]),
]


@pytest.mark.parametrize("saved_by", [(2, []), (4, ["parallel.fsdp=true"])], ids=["replicated", "fsdp"])
def test_checkpoints_do_not_know_where_experts_were(
    tmp_path: Path, data_folder: Path, saved_by: tuple[int, list[str]]
) -> None:
    """Saved after three steps under one placement, and trained on under others, against one rank without a break."""
    common = ["optim.schedule=constant", "optim.warmup_steps=0", "eval.tokens=16"]

    def config(name: str, ranks: int, steps: int, *overrides: str) -> Config:
        shape = [f"train.micro_batch={32 // ranks}", f"train.steps={steps}"]
        return config_of(tmp_path / name, data_folder, *common, *shape, *overrides)

    MockWorld(1).run(run, config("straight", 1, 5))
    expected = tensors_of(tmp_path / "straight" / "checkpoints" / "step-00000005")
    ranks, overrides = saved_by
    MockWorld(ranks).run(run, config("saved", ranks, 3, "parallel.ep=2", placement_file(tmp_path, 2), *overrides))
    saved = tmp_path / "saved" / "checkpoints" / "step-00000003"
    assert read_manifest(saved).progress["placement"]["slots"] == random_placement(2).slots_LE.tolist()
    for number, (ranks, ep, seed, more) in enumerate(RESUMES):
        placed = [] if seed is None else [placement_file(tmp_path, ep, seed)]
        resume = [f"parallel.ep={ep}", f"checkpoint.resume={saved}", *placed, *more]
        MockWorld(ranks).run(run, config(f"resumed-{number}", ranks, 5, *resume))
        tensors = tensors_of(tmp_path / f"resumed-{number}" / "checkpoints" / "step-00000005")
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            error = float((tensor - expected[name]).norm())
            assert error <= 1e-10 * float(expected[name].norm()), (number, name)
