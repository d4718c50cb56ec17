"""Whether and where parallel.overlap=auto splits: the cost model, its constants and their file."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from comparison import config_of

from moetrain import overlap
from moetrain.benchmarks.tune_overlap import Sizes, measure, show
from moetrain.cli import main
from moetrain.config import Config, from_dict
from moetrain.overlap import Overlap, decide, machine_file, read_machine, write_machine
from moetrain.overlap_cost import (
    Collective,
    HostTime,
    Machine,
    Prediction,
    _Costs,
    _Layer,
    best_split,
    collective_name,
    layer_name,
)
from moetrain.parallel import create_mesh
from moetrain.parallel.mock import MockWorld


def machine(bandwidth: float = 100e9, gain: float = 0.9, host: float = 1e-4) -> Machine:
    """Not unlike an H100; what a layer takes of the host doubles with halves."""
    kinds = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
    return Machine(
        multiprocessors=132,
        kernel_seconds=5e-6,
        product_rate=620e12,
        experts_rate=330e12,
        attention_rate=450e12,
        attention_backward_rate=380e12,
        bandwidth=2.6e12,
        collectives={collective_name(kind, 2): Collective(20e-6, bandwidth, gain) for kind in kinds},
        hosts={
            layer_name(tp, ep, moe, compiled): HostTime(host, 2 * host)
            for tp in (False, True)
            for ep in (False, True)
            for moe in (False, True)
            for compiled in (False, True)
        },
    )


def experiment(*overrides: str, tokens: int = 32768) -> Config:
    """An MoE of moe-7b-fine's layers, with a micro-batch of so many tokens."""
    length = min(4096, tokens // 4)
    return from_dict(
        {
            "model": {
                "dim": 1536,
                "n_layers": 4,
                "n_heads": 12,
                "n_kv_heads": 4,
                "num_experts": 128,
                "expert_dim": 256,
                "vocab_size": 50304,
            },
            "router": {"top_k": 8},
            "data": {"seq_len": length},
            "train": {
                "micro_batch": tokens // length,
                "tokens_per_step": 2 * tokens,
                "param_dtype": "bfloat16",
                "dtype": "bfloat16",
            },
        },
        overrides,
    )


def state(config: Config, machine: Machine, dp: int = 2) -> str:
    return decide(replace(config, parallel=replace(config.parallel, overlap="auto")), dp, machine).state


def test_auto_splits_where_there_is_much_to_hide_and_a_fast_host() -> None:
    ep = experiment("parallel.ep=2")
    assert state(ep, machine()) == "on"
    assert state(ep, machine(host=15e-3)) == "off"  # twice the launches
    assert state(ep, machine(bandwidth=10e12)) == "off"  # nothing to hide
    assert state(ep, machine(gain=0.0)) == "off"  # they take turns
    assert state(experiment("parallel.ep=2", tokens=1024), machine()) == "off"  # kernels of few rows
    tp = experiment("parallel.tp=2")
    assert (state(tp, machine(), 1), state(tp, machine(bandwidth=10e12), 1)) == ("on", "off")
    dense = experiment("parallel.tp=2", "model.num_experts=0", "model.ffn_dim=8192")
    assert (state(dense, machine(), 1), state(dense, machine(host=15e-3), 1)) == ("on", "off")


@pytest.mark.parametrize(("topology", "sequences"), [("parallel.ep=2", 8), ("parallel.tp=2", 4)])
def test_the_gain_is_no_more_than_what_is_hidden(topology: str, sequences: int) -> None:
    def predict(mode: str) -> tuple[_Layer, Prediction]:
        costs = _Costs(experiment(topology, f"train.activation_checkpointing.mode={mode}"), machine(gain=1.0))
        return costs._layer(True, mode == "selective", sequences), costs.predict(sequences // 2, sequences // 2)

    layer, predicted = predict("none")
    assert predicted.whole == pytest.approx(4 * float((layer.computing + layer.communicating).sum()))
    assert 4 * float(layer.computing.sum()) < predicted.halves < predicted.whole
    # Attention is computed again from what is gathered again, beside nothing; experts from what they have kept.
    layer_again, again = predict("selective")
    assert layer_again.computing.sum() > layer.computing.sum()
    saved, saved_again = (p.whole - p.halves for p in (predicted, again))
    gathers = topology == "parallel.tp=2"
    assert float((layer_again.communicating - layer.communicating).sum()) == pytest.approx(
        float(layer.communicating[0, 0]) if gathers else 0.0
    )
    assert saved_again < 0.5 * saved if gathers else saved_again == pytest.approx(saved, rel=0.01)


def schedule(first: Sequence[float], second: Sequence[float], layers: int) -> float:
    """When the last of :func:`moetrain.parallel.overlap.weave` ends, if both streams run at full speed."""
    communicating = computing = 0.0
    ends = [0.0, 0.0]
    for turn in range(2 * layers):
        place = turn % 2 * 2
        for half, phases in enumerate((first, second)):
            communicating = max(communicating, ends[half]) + phases[place]
            computing = max(computing, communicating) + phases[place + 1]
            ends[half] = computing
    return computing


def test_the_cost_of_halves_is_that_of_the_schedule() -> None:
    costs = _Costs(experiment("parallel.ep=2"), machine(gain=1.0))
    seed = random.Random(0)
    ratios = []
    for _ in range(200):
        halves = [[seed.uniform(0.2, 1.0) for _ in range(4)] for _ in range(2)]
        layers = [
            _Layer(
                np.array([[0, 0], [half[1], 0], [0, 0], [half[3], 0]]),
                np.array([[half[0], 0], [0, 0], [half[2], 0], [0, 0]]),
            )
            for half in halves
        ]
        predicted = 50 * costs._woven(*layers)
        ratios.append(schedule(*halves, layers=50) / predicted)
    # What a slot leaves over, the next one may use: never slower than promised, and seldom much faster.
    assert min(ratios) > 0.85
    assert max(ratios) < 1 + 1 / 50
    assert float(np.median(ratios)) > 0.95


def test_a_split_fills_the_multiprocessors() -> None:
    dense = ["model.num_experts=0", "model.dim=2048", "model.n_heads=16", "model.ffn_dim=8192", "parallel.tp=2"]
    config = experiment(
        *dense, "model.n_kv_heads=16", "data.seq_len=1536", "train.micro_batch=12", "train.tokens_per_step=18432"
    )
    split, predicted = best_split(config, 1, machine())
    assert split != 3
    assert predicted.halves < _Costs(config, machine()).predict(3, 3).halves
    assert best_split(config, 1, replace(machine(), multiprocessors=1))[0] == 3  # no waves that could be half empty
    given = replace(config, parallel=replace(config.parallel, overlap_split=1))
    assert best_split(given, 1, machine())[0] == 1


def test_a_product_takes_whole_waves() -> None:
    costs = _Costs(experiment("parallel.ep=2"), machine())
    full = costs._product(11 * 128, 12 * 256, 4096)  # 132 tiles
    assert full - 5e-6 == pytest.approx(2 * 11 * 128 * 12 * 256 * 4096 / 620e12)
    assert costs._product(11 * 128 + 1, 12 * 256, 4096) - 5e-6 == pytest.approx(2 * (full - 5e-6))
    # Few tiles are split along the inner dimension.
    assert costs._product(128, 256, 64 * 1024) - 5e-6 == pytest.approx((full - 5e-6) / 4)


def test_on_is_obeyed_and_off_says_why() -> None:
    slow = machine(host=15e-3)
    forced = experiment("parallel.ep=2", "parallel.overlap=on")
    assert decide(forced, 2, slow) == Overlap("on", 4, decide(forced, 2, slow).reason)
    refused = decide(experiment("parallel.ep=2"), 2, slow)
    assert refused.state == "off"
    assert "off, by the cost model" in (refused.reason or "")
    assert "the host is the limit" in (refused.reason or "")
    four = experiment("parallel.ep=4", "train.tokens_per_step=131072")
    assert "measured without 'all_to_all of 4'" in (decide(four, 4, machine()).reason or "")
    assert decide(replace(four, parallel=replace(four.parallel, overlap="on")), 4, machine()) == Overlap("on")


def choose(config: Config, measured: Machine | None, monkeypatch: pytest.MonkeyPatch, device: str = "cuda") -> Overlap:
    monkeypatch.setattr(overlap, "machine_name", lambda mesh: "here")
    monkeypatch.setattr(overlap, "read_machine", lambda name: {"here": measured}[name])
    dp = 2 // config.parallel.tp
    mesh: Any = SimpleNamespace(device=torch.device(device), dp=dp, world_size=2)
    return overlap._choose(config, mesh)


def test_auto_never_changes_results_and_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(experiment("parallel.ep=2"), machine(), monkeypatch).state == "on"
    for overrides, reason in (
        (["router.capacity_factor=1.5"], "router.capacity_factor would count the tokens of a half"),
        (["router.rounding=nearest"], "router.rounding would count"),
        (["router.jitter=0.1"], "router.jitter would count"),
        (["parallel.fsdp=true"], "not with this parallel.fsdp"),
        (["train.micro_batch=1"], "two or more whole sequences"),
        (["parallel.overlap_split=8"], "parallel.overlap_split = 8 leaves nothing"),
    ):
        chosen = choose(experiment("parallel.ep=2", *overrides), machine(), monkeypatch)
        assert chosen.state == "off"
        assert reason in (chosen.reason or "")
    unmeasured = choose(experiment("parallel.ep=2"), None, monkeypatch)
    assert unmeasured.state == "off"
    assert "do so once: torchrun --nproc-per-node 2 -m moetrain tune overlap" in (unmeasured.reason or "")
    # Where there is nothing to decide, nothing is said.
    for config, device in ((experiment(), "cuda"), (experiment("parallel.ep=2"), "cpu")):
        assert choose(config, machine(), monkeypatch, device) == Overlap("off")
    forced = experiment("parallel.ep=2", "parallel.overlap=on", "parallel.overlap_split=3")
    assert choose(forced, None, monkeypatch) == choose(forced, None, monkeypatch, "cpu") == Overlap("on", 3)
    applied = choose(forced, machine(), monkeypatch).applied(forced)
    assert (applied.parallel.weaves, applied.parallel.overlap_split) == (True, 3)


def test_constants_are_kept_by_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read_machine("here") is None
    one, other = machine(), machine(host=1.0)
    assert write_machine("here", one) == write_machine("there", other) == machine_file()
    assert (read_machine("here"), read_machine("there"), read_machine("elsewhere")) == (one, other, None)


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"format": "another", "machines": {}}', '{"format": 1'])
def test_a_damaged_file_is_no_measurement(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_machine("here", machine())
    machine_file().write_text(damage)
    assert read_machine("here") is None
    assert f"{machine_file()}: ignored, measure again" in caplog.text
    contents = {"format": overlap.FORMAT, "machines": {"here": {**asdict(machine()), "more": 1}}}
    machine_file().write_text(json.dumps(contents))
    assert read_machine("here") is None


def measured_here() -> Machine:
    sizes = Sizes(
        side=64,
        sequences=(1, 2, 32, 8),
        experts=(64, 32, 16, 4, 2),
        width=32,
        small_rows=3,
        large_rows=64,
        calls=1,
        layer=(16, 8),
        layers=(1, 2),
        steps=1,
        rounds=1,
    )
    mesh = create_mesh(device="cpu")
    return measure(mesh, sizes, compiled=(False,))


def test_a_measurement_has_all_that_a_decision_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = MockWorld(2).run(measured_here)
    for name in ("product_rate", "experts_rate", "attention_rate", "attention_backward_rate", "bandwidth"):
        assert 0 < getattr(found, name) < float("inf")
    assert list(found.collectives) == [
        f"{kind} of 2" for kind in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
    ]
    assert all(0 <= collective.gain <= 1 and collective.latency > 0 for collective in found.collectives.values())
    for overrides in (["parallel.ep=2"], ["parallel.tp=2"], ["parallel.tp=2", "parallel.ep=2"]):
        # Dense and MoE layers.
        config = config_of(Path("run"), Path("data"), *overrides, "train.micro_batch=4", "train.tokens_per_step=128")
        split, predicted = best_split(config, 2 // config.parallel.tp, found)
        assert split >= 1
        assert min(predicted[:2]) > 0
    show("here", found)
    shown = capsys.readouterr().out
    assert "tp ep moe" in shown
    assert "all_to_all of 2" in shown


def test_tuning_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "overlap"]) == 2
    assert "start it with torchrun --nproc-per-node N -m moetrain tune overlap" in capsys.readouterr().err
