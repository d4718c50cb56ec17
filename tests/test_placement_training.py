"""Training with a placement: the same numbers wherever the experts are or go, and checkpoints that do not know it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from comparison import STEPS, Numbers, assert_same, config_of, train
from ranks import run_ranks
from test_trainer import metrics
from torch import Tensor

from moetrain import rebalance, trainer
from moetrain.checkpoint import contents, load, read_manifest, verify
from moetrain.checkpointer import owned
from moetrain.cli import main
from moetrain.config import Config, from_dict
from moetrain.errors import ConfigError, PlacementError
from moetrain.expert_placement import initial_placement
from moetrain.files import sha256
from moetrain.model import Decoder
from moetrain.parallel import create_mesh, destroy_mesh, migration
from moetrain.parallel.mock import MockWorld, RankError
from moetrain.parallel.sharding import ScatteredTensor
from moetrain.placement.placement import Placement, load_placement, save_placement
from moetrain.plan import make_plan, plan_command
from moetrain.state import logical_tensors
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
    tp = 2 if "parallel.tp=2" in overrides else 1
    placed = [f"parallel.ep={ep}", placement_file(tmp_path, ep), f"train.micro_batch={32 * tp // ranks}", *overrides]
    assert_same(MockWorld(ranks).run(train, config_of(tmp_path / "run", data_folder, *placed)), one_rank)


@pytest.mark.parametrize("routing", ["router.rounding=nearest", "router.capacity_factor=1.1"])
def test_routing_knows_nothing_of_a_placement(tmp_path: Path, data_folder: Path, routing: str) -> None:
    """Every metric of the routing is the same, to the last bit at first; the losses are as good as that."""
    common = ["parallel.ep=2", "train.micro_batch=16", "router.bias_update_rate=0", routing]
    runs = {"plain": [], "placed": [placement_file(tmp_path, 2)]}
    numbers = {
        name: MockWorld(2).run(train, config_of(tmp_path / name, data_folder, *common, *more))
        for name, more in runs.items()
    }
    assert_same(numbers["placed"], numbers["plain"][0])
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
        router.bias += torch.linspace(0.03, 0, EXPERTS)


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Numbers:
    config = config_of(tmp_path_factory.mktemp("skewed"), data_folder, "train.micro_batch=32", *SKEWED)
    return MockWorld(1).run(train, config, skew)[0]


@pytest.mark.parametrize(
    ("ep", "ranks", "overrides"),
    [
        (2, 2, []),
        (4, 4, []),
        (2, 4, ["parallel.fsdp=true", "parallel.reshard_after_forward=false", "eval.every=3"]),
    ],
)
def test_experts_that_move_change_no_number(
    tmp_path: Path, data_folder: Path, skewed: Numbers, ep: int, ranks: int, overrides: list[str]
) -> None:
    common = [f"train.micro_batch={32 // ranks}", f"parallel.ep={ep}", *overrides]
    config = config_of(tmp_path, data_folder, *common, *REBALANCE)
    assert_same(MockWorld(ranks).run(train, config, skew), skewed)
    seen = metrics(tmp_path)
    # Looked for after step 2, and taken up after step 4: the next one is shared better.
    assert [step for step, values in seen.items() if values.get("placement/moved_experts")] == [5]
    assert seen[5]["placement/gain"] > 0.05
    assert seen[5]["placement/rank_load"] < 0.95 * seen[4]["placement/rank_load"]


def test_traffic_is_judged_by_what_was_recorded(tmp_path: Path, data_folder: Path) -> None:
    settings = [*SKEWED, "placement.rebalance.every=3", "placement.rebalance.min_gain=0", "placement.trace.every=1"]
    settings += [
        "placement.rebalance.objective=traffic+0.01*load",
        "parallel.ep=4",
        "train.micro_batch=8",
        "train.steps=8",
    ]
    settings += ["eval.tokens=16", "optim.lr=1e-9"]  # tokens go where they went before
    MockWorld(4).run(run, config_of(tmp_path, data_folder, *settings), skew)
    seen = metrics(tmp_path)
    (moved,) = (step for step, values in seen.items() if values.get("placement/moved_experts"))
    assert moved == 7
    assert seen[7]["placement/gain"] > 0.02
    assert seen[7]["moe/dispatch_bytes"] < 0.98 * seen[6]["moe/dispatch_bytes"]


def steps_judged(config: Config, resumed: int, step: int) -> range:
    """By the first search, of a run that goes on from a checkpoint."""
    mesh = create_mesh(ep=1, device="cpu")
    model: Any = SimpleNamespace(moe_layers=range(LAYERS))
    rebalancer = rebalance.Rebalancer(config, mesh, model, cast(Any, None), resumed, print)
    request: Any = rebalancer._objective(rebalancer._load_LE, step)
    destroy_mesh()
    return next(argument for argument in request.args if isinstance(argument, range))


def test_traffic_before_a_resume_does_not_count(tmp_path: Path) -> None:
    traffic = ["placement.rebalance.every=5", "placement.rebalance.objective=traffic", "placement.trace.every=1"]
    assert MockWorld(1).run(steps_judged, config_of(tmp_path, tmp_path, *traffic), 7, 10) == [range(8, 11)]


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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu2)])
def test_real_ranks_move_experts(tmp_path: Path, data_folder: Path, device: str) -> None:
    common = ["parallel.ep=2", "train.micro_batch=16", f"run.device={device}", "eval.tokens=16", *SKEWED]
    if device == "cuda":
        common += ["train.param_dtype=float32", "train.dtype=float32", "kernels.experts=reference"]
    for name, settings in (("still", []), ("moving", [*REBALANCE, "placement.rebalance.min_gain=0"])):
        run_ranks(2, trainer.train, config_of(tmp_path / name, data_folder, *common, *settings))
    still, moving = (metrics(tmp_path / name) for name in ("still", "moving"))
    assert moving[5]["placement/moved_experts"] > 0
    for step in range(1, STEPS + 1):
        for name in ("loss_metrics/global_avg_loss", "grad_norm"):
            rel = 1e-10 if device == "cpu" else 1e-4
            assert moving[step][name] == pytest.approx(still[step][name], rel=rel), (step, name)


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


@pytest.mark.parametrize(
    ("ranks", "overrides", "resumes"),
    [
        # Resumed by (ranks, ep, seed of the placement or None without one, overrides).
        (4, [], [(2, 2, 1, []), (1, 1, None, []), (4, 2, 2, ["parallel.fsdp=true"])]),
        (4, ["parallel.fsdp=true"], [(2, 2, None, []), (4, 4, 0, [])]),
    ],
    ids=["replicated", "fsdp"],
)
def test_checkpoints_do_not_know_where_experts_were(
    tmp_path: Path, data_folder: Path, ranks: int, overrides: list[str], resumes: list[tuple[int, int, int | None, Any]]
) -> None:
    """Saved after two steps under a placement, and trained on under others, against one rank without a break."""
    common = ["optim.schedule=constant", "optim.warmup_steps=0", "eval.tokens=16"]

    def config(name: str, ranks: int, steps: int, *overrides: str) -> Config:
        shape = [f"train.micro_batch={32 // ranks}", f"train.steps={steps}"]
        return config_of(tmp_path / name, data_folder, *common, *shape, *overrides)

    MockWorld(1).run(run, config("straight", 1, 3))
    expected = tensors_of(tmp_path / "straight" / "checkpoints" / "step-00000003")
    MockWorld(ranks).run(run, config("saved", ranks, 2, "parallel.ep=2", placement_file(tmp_path, 2), *overrides))
    saved = tmp_path / "saved" / "checkpoints" / "step-00000002"
    assert read_manifest(saved).progress["placement"]["slots"] == random_placement(2).slots_LE.tolist()
    for number, (ranks, ep, seed, more) in enumerate(resumes):
        placed = [] if seed is None else [placement_file(tmp_path, ep, seed)]
        resume = [f"parallel.ep={ep}", f"checkpoint.resume={saved}", *placed, *more]
        MockWorld(ranks).run(run, config(f"resumed-{number}", ranks, 3, *resume))
        tensors = tensors_of(tmp_path / f"resumed-{number}" / "checkpoints" / "step-00000003")
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            error = float((tensor - expected[name]).norm())
            assert error <= 1e-10 * float(expected[name].norm()), (number, name)


def expert_bytes_written(ep: int, slots_LE: list[list[int]]) -> int:
    """By this rank into a checkpoint."""
    config = config_of(Path(), Path(), f"parallel.ep={ep}")
    mesh = create_mesh(ep=ep, device="cpu")
    written = owned(logical_tensors(Decoder(config, mesh, slots_LE)), mesh)
    destroy_mesh()
    locals_ = [tensor.to_local() for tensor in written.values() if isinstance(tensor, ScatteredTensor)]
    return sum(local.numel() * local.element_size() for local in locals_)


def test_one_copy_of_each_expert_is_written() -> None:
    written = MockWorld(4).run(expert_bytes_written, 2, random_placement(2).slots_LE.tolist())
    assert sum(written) == LAYERS * EXPERTS * 3 * 16 * 16 * 8
    assert min(written) > 0  # they share the work


def test_experts_stay_where_a_checkpoint_had_them(
    tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a move, a run that goes on from a checkpoint is the same to the bit as if it had not stopped."""
    settings = ["parallel.ep=2", "train.micro_batch=16", "eval.tokens=16", "train.steps=6", *REBALANCE]
    straight, resumed = (tmp_path / name / "checkpoints" for name in ("straight", "resumed"))
    MockWorld(2).run(run, config_of(straight.parent, data_folder, *settings, "checkpoint.every=5"), skew)
    source = straight / "step-00000005"
    go_on = [*settings, f"checkpoint.resume={source}", "placement.rebalance.every=0"]
    MockWorld(2).run(run, config_of(resumed.parent, data_folder, *go_on))
    expected, tensors = (tensors_of(path / "step-00000006") for path in (straight, resumed))
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
    slots = [read_manifest(path).progress["placement"]["slots"] for path in (source, resumed / "step-00000006")]
    contiguous = Placement.contiguous(LAYERS, EXPERTS, 2)
    assert slots[0] == slots[1] != contiguous.slots_LE.tolist()

    with pytest.raises(RankError, match=r"was written by a model with other model\.n_layers"):
        MockWorld(2).run(run, config_of(tmp_path / "other", data_folder, *go_on, "model.n_layers=4"))

    capsys.readouterr()
    assert main(["checkpoint", "info", str(source)]) == 0
    moved = int((np.array(slots[0]) // 4 != contiguous.gpu_LE).sum())
    assert f"placement: on 2 ranks, {moved} of 16 experts elsewhere" in capsys.readouterr().out


def progress_of(**record: Any) -> dict[str, Any]:
    return {"placement": {"num_gpus": 2, "slots": random_placement(2, 5).slots_LE.tolist(), **record}}


def test_file_or_checkpoint(tmp_path: Path) -> None:
    """A placement.file that is as it was leaves experts where they had moved to; a new one counts."""
    key = placement_file(tmp_path, 2)
    path = Path(key.removeprefix("placement.file="))
    config = config_of(tmp_path, tmp_path, "parallel.ep=2", key)
    of_file, moved = random_placement(2).slots_LE.tolist(), progress_of(file_sha256=sha256(path))

    def slots(config: Config, saved: dict[str, Any] | None) -> tuple[list[list[int]] | None, str | None]:
        placement, remark = initial_placement(config, saved)
        return None if placement is None else placement.slots, remark

    assert slots(config, None) == (of_file, "experts are placed by placement.file")
    assert slots(config, moved) == (moved["placement"]["slots"], "experts stay where the checkpoint had them")
    assert slots(config, {"placement": None}) == (of_file, "experts are placed by placement.file")
    changed = "experts are placed by placement.file, not as in the checkpoint: placement.file has changed"
    assert slots(config, progress_of(file_sha256="another")) == (of_file, changed)

    unplaced = config_of(tmp_path, tmp_path, "parallel.ep=2")
    assert slots(unplaced, None) == (None, None)
    assert slots(unplaced, progress_of(file_sha256=None))[0] == moved["placement"]["slots"]
    by_number = "experts are placed by their numbers, not as in the checkpoint: "
    assert slots(unplaced, moved) == (None, f"{by_number}placement.file has changed")
    four = config_of(tmp_path, tmp_path, "parallel.ep=4")
    assert slots(four, progress_of(file_sha256=None)) == (None, f"{by_number}parallel.ep has changed")
    assert slots(config_of(tmp_path, tmp_path), moved) == (None, None)
    watched = config_of(tmp_path, tmp_path, "parallel.ep=2", "placement.rebalance.every=9")
    assert slots(watched, None) == (Placement.contiguous(LAYERS, EXPERTS, 2).slots_LE.tolist(), None)


# What does not fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"assignment": [[0, 0.5]]}, "assignment has something else than whole numbers"),
        ({"assignment": [[0, 10**30]]}, "assignment has something else than whole numbers"),
        ({"assignment": [["0", "1"]]}, "assignment has something else than whole numbers"),
        ({"assignment": [[0, 1], [0]]}, "assignment has layers of different lengths"),
        ({"assignment": []}, r"assignment has shape \[0\]"),
        ({"assignment": [[0, -1]]}, "names a GPU beyond 0 to 1"),
        ({"num_gpus": 2.5}, "num_gpus is 2.5"),
        ({"num_gpus": -1}, "num_gpus is -1"),
        ({"num_layers": None}, "num_layers × num_experts is None × 2, but the assignment is 1 × 2"),
    ],
)
def test_files_that_are_no_placements(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    record = {"num_layers": 1, "num_experts": 2, "num_gpus": 2, "assignment": [[0, 1]]}
    path = tmp_path / "p.json"
    path.write_text(json.dumps(record))
    assert load_placement(path).gpu_LE.tolist() == [[0, 1]]
    path.write_text(json.dumps(record | changes))
    with pytest.raises(PlacementError, match=rf"p\.json: .*{message}"):
        load_placement(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "no JSON: "), ("[" * 100_000, "no JSON: "), ("[1]", "holds no JSON object"), ("{}", "no key 'num_layers'")],
)
def test_files_that_are_something_else(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(PlacementError, match=rf"p\.json: {message}"):
        load_placement(path)


def test_placements_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"

    def refusal(gpu_LE: Any, num_gpus: int) -> str:
        save_placement(path, Placement(np.array(gpu_LE), num_gpus))
        with pytest.raises(PlacementError) as caught:
            make_plan(config_of(tmp_path, tmp_path, "parallel.ep=2", f"placement.file={path}"), 2)
        return str(caught.value)

    key = f"placement.file = {path}: "
    assert refusal([[0, 0, 1, 1]] * 2, 2).startswith(f"{key}is of 2 MoE layers of 4 experts, and the model has 2 of 8")
    assert refusal([[0] * 4 + [1] * 4] * 3, 2).startswith(f"{key}is of 3 MoE layers of 8 experts")
    assert refusal([[0, 1, 2, 3] * 2] * 2, 4).startswith(f"{key}is for 4 GPUs, but parallel.ep = 2")
    assert refusal([[0] * 3 + [1] * 5] * 2, 2).startswith(f"{key}puts 3 to 5 experts of a layer on a GPU")
    path.unlink()
    with pytest.raises(PlacementError, match=r"placement\.file: .*placement\.json: No such file.*; `moetrain place`"):
        initial_placement(config_of(tmp_path, tmp_path, f"placement.file={path}"), None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["placement.rebalance.every=5", "parallel.engine=deepspeed"], "rebalance.every = 5: with parallel.engine = d"),
        (["placement.rebalance.every=5", "placement.rebalance.objective=traffic"], "objective = traffic: is judged by"),
        (
            ["placement.rebalance.every=5", "placement.rebalance.objective=hops"],
            "hops: 'hops' is none of load, traffic",
        ),
        (
            ["placement.rebalance.every=5", "placement.trace.every=5", "placement.rebalance.objective=1.2.3*load"],
            r"1\.2\.3\*load: .* is none of load, traffic",
        ),
        (["placement.rebalance.every=5", "placement.rebalance.objective=0*load"], "must be positive and finite"),
        (["placement.rebalance.min_gain=1"], r"min_gain = 1.0: must be in \[0, 1\)"),
        (["placement.rebalance.every=-1"], "placement.rebalance.every = -1: must not be negative"),
        (["placement.file=x", "model.num_experts=0"], "placement.file = x: a dense model"),
        (["placement.rebalance.every=5", "model.num_experts=0"], "placement.rebalance.every = 5: a dense model"),
    ],
)
def test_settings_that_do_not_fit(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict({"train": {"param_dtype": "float32"}}, overrides)


def test_a_topology_of_another_machine(tmp_path: Path, data_folder: Path) -> None:
    topology = tmp_path / "machine.yaml"
    topology.write_text("nodes: 1\ngpus_per_node: 4\nnvlink: {bandwidth: 450 GB/s, latency: 2 us}\n")
    settings = ["parallel.ep=2", "train.micro_batch=16", *REBALANCE, f"placement.rebalance.topology={topology}"]
    with pytest.raises(RankError, match=r"placement\.rebalance\.topology: .*machine\.yaml: has 4 GPUs, not 2"):
        MockWorld(2).run(run, config_of(tmp_path / "run", data_folder, *settings))


def test_recordings_need_a_folder(tmp_path: Path, data_folder: Path) -> None:
    """Known at the start, not at the first step that is recorded."""
    file = tmp_path / "file"
    file.touch()
    settings = ["train.micro_batch=32", "placement.trace.every=100", f"placement.trace.dir={file}"]
    with pytest.raises(RankError, match=r"placement\.trace\.dir = .*file: File exists; choose another folder"):
        MockWorld(1).run(run, config_of(tmp_path / "run", data_folder, *settings))


def test_the_plan_shows_who_holds_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "placement.json"
    save_placement(path, Placement(np.array([[0, 1, 0, 0, 1, 1, 1, 0]] * 2), 2))
    config = config_of(tmp_path, tmp_path, "parallel.ep=2", f"placement.file={path}")
    assert make_plan(config, 4).expert_ranks == (([0, 2, 3, 7], range(0, 4, 2)), ([1, 4, 5, 6], range(1, 4, 2)))
    assert plan_command(config, 4) == 0
    out = " ".join(capsys.readouterr().out.split())
    for part in ("Experts 0, 2–3, 7", "on ranks 0, 2", "Experts 1, 4–6", "on ranks 1, 3"):
        assert part in out
