"""Traces: their files, what they say, and that recordings hold what the routers chose."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparison import config_of
from comparison import train as train_steps
from test_trainer import make_config, run

from moetrain.cli import main
from moetrain.config import Config
from moetrain.data import open_dataset
from moetrain.data.loader import Loader
from moetrain.errors import ConfigError, TraceError
from moetrain.kernels import Routing
from moetrain.model import Decoder
from moetrain.parallel.mock import MockWorld
from moetrain.placement.placement import Placement
from moetrain.placement.statistics import (
    coactivation_LEE,
    drift,
    imbalance_L,
    load_LE,
    load_LG,
    load_RLE,
    transitions_LEE,
    windows,
)
from moetrain.placement.trace import Trace, load_trace, save_trace
from moetrain.trace_recorder import _experts_of, drop_after, recording_name


def random_trace(tokens: int, layers: int, top_k: int, experts: int, seed: int = 0, missing: float = 0.0) -> Trace:
    """Different experts for each token, some of them missing, of 4 ranks and 10 steps."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, layers, experts)), axis=-1)[:, :, :top_k]
    ids[rng.random(ids.shape) < missing] = -1
    numbers = np.arange(tokens)
    return Trace(ids, experts, numbers % 4, numbers * 10 // tokens, tuple(range(1, layers + 1)))


def same(a: Trace, b: Trace) -> bool:
    fields = ("expert_ids_SLK", "source_S", "step_S")
    return (a.num_experts, a.layers) == (b.num_experts, b.layers) and all(
        np.array_equal(getattr(a, field), getattr(b, field)) for field in fields
    )


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "missing", "dtype"), [(256, 0, "uint8"), (256, 0.1, "int16"), (257, 0, "uint16")])
def test_a_trace_is_read_as_it_was_written(tmp_path: Path, experts: int, missing: float, dtype: str) -> None:
    trace = random_trace(200, 3, 2, experts, missing=missing)
    trace.expert_ids_SLK[0, 0] = [0, experts - 1]
    save_trace(tmp_path / "trace.npz", trace)
    assert same(load_trace(tmp_path / "trace.npz"), trace)
    assert [file.name for file in tmp_path.iterdir()] == ["trace.npz"]
    with np.load(tmp_path / "trace.npz") as arrays:
        assert arrays["schema_version"] == 1
        assert {name: str(arrays[name].dtype) for name in ("expert_ids", "source", "step")} == {
            "expert_ids": dtype,
            "source": "uint8",
            "step": "uint8",
        }


def test_traces_of_others(tmp_path: Path) -> None:
    ids = random_trace(50, 3, 2, 8).expert_ids_SLK
    np.savez(tmp_path / "topk.npz", expert_ids=ids)
    np.savez_compressed(tmp_path / "top1.npz", expert_ids=ids[..., 0].astype(np.uint8))
    np.save(tmp_path / "topk.npy", ids)
    for name, expected in {"topk.npz": ids, "top1.npz": ids[..., :1], "topk.npy": ids}.items():
        trace = load_trace(tmp_path / name)
        assert np.array_equal(trace.expert_ids_SLK, expected)
        assert (trace.num_experts, trace.inferred_experts, trace.step_S, trace.layers) == (8, True, None, None)
        given = load_trace(tmp_path / name, 9)
        assert (given.num_experts, given.inferred_experts) == (9, False)


def test_a_folder_is_one_trace(tmp_path: Path) -> None:
    parts = [random_trace(30, 3, top_k, 8, seed=top_k) for top_k in (2, 3)]
    folder = tmp_path / "run" / "trace"
    folder.mkdir(parents=True)
    for step, part in enumerate(parts):
        save_trace(folder / recording_name(step, 0), part)
    (folder / ".step-00000002-rank-00000.npz.77.tmp").write_bytes(b"half")
    whole = load_trace(folder)
    assert same(whole, load_trace(tmp_path / "run"))
    assert whole.expert_ids_SLK.shape == (60, 3, 3)
    assert np.array_equal(whole.expert_ids_SLK[:30, :, :2], parts[0].expert_ids_SLK)
    assert (whole.expert_ids_SLK[:30, :, 2] == -1).all()
    assert np.array_equal(whole.expert_ids_SLK[30:], parts[1].expert_ids_SLK)
    assert whole.step_S is not None
    assert np.array_equal(whole.step_S, np.concatenate([part.step_S for part in parts if part.step_S is not None]))

    save_trace(folder / recording_name(2, 0), random_trace(30, 3, 2, 16))
    with pytest.raises(TraceError, match=r"run: its files are of different models \(16 experts in 3 layers and 8 exp"):
        load_trace(tmp_path / "run")


IDS = np.tile(np.arange(8).reshape(4, 2), (10, 1))


def as_npz(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)


def truncated(path: Path) -> None:
    np.savez(path, expert_ids=IDS)
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    np.savez_compressed(path, expert_ids=IDS)
    contents = bytearray(path.read_bytes())
    contents[contents.index(b"expert_ids.npy") + 60] ^= 255
    path.write_bytes(contents)


def pickled(path: Path) -> None:
    np.savez(path, expert_ids=np.array([[{}]], dtype=object), allow_pickle=True)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "No such file or directory; give a trace file or a folder"),
    "empty": (lambda path: path.touch(), "neither .npz nor .npy; save it with numpy.savez_compressed"),
    "text": (lambda path: path.write_text("expert_ids"), "neither .npz nor .npy"),
    "pickled": (pickled, "holds pickled Python objects, which could run code when loaded; save the ids as a plain"),
    "pickled npy": (lambda path: np.save(path.open("wb"), np.array([{}])), "holds pickled Python objects"),
    "truncated": (truncated, "not a whole .npz file .*; copy or record it again"),
    "flipped": (flipped, "not a whole .npz file"),
    "half an npy": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', "), "not a whole .npy file"),
    "other names": (as_npz(ids=IDS, x=IDS), r"no array `expert_ids` \(there are: ids, x\); name the ids"),
    "floats": (as_npz(expert_ids=IDS.astype(float)), "expert_ids is float64; save it as integers"),
    "nan": (as_npz(expert_ids=np.where(IDS, IDS, np.nan)), "float64, with NaN; save it as integers, with −1 for none"),
    "bool": (as_npz(expert_ids=IDS > 3), "expert_ids is bool; save it as integers"),
    "text ids": (as_npz(expert_ids=IDS.astype(str)), "expert_ids is <U21; save it as integers"),
    "one dimension": (as_npz(expert_ids=IDS[:, 0]), r"shape \[40\]; save it as \[tokens, layers\] or"),
    "four dimensions": (as_npz(expert_ids=IDS[None, None]), r"shape \[1, 1, 40, 2\]"),
    "no tokens": (as_npz(expert_ids=IDS[:0]), r"shape \[0, 2\]"),
    "below": (as_npz(expert_ids=IDS - 2), "expert id -2 is out of range, 0 to 5; use a trace of this model"),
    "above": (as_npz(expert_ids=IDS, num_experts=7), "expert id 7 is out of range, 0 to 6; use a trace of this model"),
    "none": (as_npz(expert_ids=np.full((9, 2), -1)), "too few tokens: 9, with 0 experts chosen"),
    "twice": (as_npz(expert_ids=np.full((9, 3, 2), 5)), "token 0 has expert 5 twice in layer 0; a token's experts are"),
    "too few": (as_npz(expert_ids=IDS[:7]), "too few tokens: 7, with 7 experts chosen among 8 in a layer; record more"),
    "schema": (as_npz(expert_ids=IDS, schema_version=2), "schema_version is 2, and this moetrain reads 1; record"),
    "fraction": (as_npz(expert_ids=IDS, num_experts=8.5), "num_experts is float64; save it as integers"),
    "no experts": (as_npz(expert_ids=IDS, num_experts=0), "num_experts must be one positive number"),
    "steps": (as_npz(expert_ids=IDS, step=np.arange(3)), r"step has shape \[3\]; .* for each token, \[40\]"),
    "sources": (as_npz(expert_ids=IDS, source=np.full(40, -1)), r"source .* a number from 0 for each token, \[40\]"),
    "layers": (as_npz(expert_ids=IDS, layers=np.arange(3)), r"layers has shape \[3\]; .* for each layer, \[2\]"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_trace(tmp_path: Path, kind: str) -> None:
    make, message = BAD[kind]
    path = tmp_path / "trace.npz"
    make(path)
    with pytest.raises(TraceError, match=f"^{path}: .*{message}"):
        load_trace(path)


def test_a_trace_of_other_experts_than_asked_for(tmp_path: Path) -> None:
    save_trace(tmp_path / "trace.npz", random_trace(50, 2, 1, 8))
    with pytest.raises(TraceError, match="is of 8 experts, not 16; use a trace of this model"):
        load_trace(tmp_path / "trace.npz", 16)
    with pytest.raises(TraceError, match=r"no \.npz files in this folder; record some with placement\.trace\.every"):
        load_trace(tmp_path.parent / tmp_path.name / "..")


def test_split_holds_out_blocks() -> None:
    trace = random_trace(1000, 2, 1, 8)
    trace = Trace(trace.expert_ids_SLK, 8, source_S=np.arange(1000))
    fit, held_out = trace.split(0.2, seed=1)
    assert fit.source_S is not None
    assert held_out.source_S is not None
    assert (fit.num_tokens, held_out.num_tokens) == (800, 200)
    assert sorted([*fit.source_S, *held_out.source_S]) == list(range(1000))
    assert np.array_equal(held_out.expert_ids_SLK, trace.expert_ids_SLK[held_out.source_S])
    blocks, sizes = np.unique(held_out.source_S // 10, return_counts=True)
    assert (sizes == 10).all()
    assert blocks.max() - blocks.min() > 40  # and they are from everywhere
    assert same(trace.split(0.2, seed=1)[1], held_out)
    assert not same(trace.split(0.2, seed=2)[1], held_out)
    for fraction in (0.0, 0.004, 1.0):
        with pytest.raises(TraceError, match=r"1000 tokens cannot be split so that a fraction of .* choose a fraction"):
            trace.split(fraction)
    with pytest.raises(TraceError, match="1 tokens cannot be split"):
        trace.select(slice(1)).split(0.5)


# Statistics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "missing"), [(1, 0.0), (3, 0.0), (3, 0.4)])
def test_statistics_by_their_definitions(top_k: int, missing: float) -> None:
    trace = random_trace(60, 3, top_k, 5, missing=missing)
    chosen = [[[int(e) for e in layer if e >= 0] for layer in token] for token in trace.expert_ids_SLK]
    load, together, transitions = np.zeros((3, 5)), np.zeros((3, 5, 5)), np.zeros((2, 5, 5))
    for token in chosen:
        for layer, experts in enumerate(token):
            for e in experts:
                load[layer, e] += 1 / 60
            for e, f in itertools.product(experts, experts):
                together[layer, e, f] += 1 / 60
        for layer, (before, after) in enumerate(itertools.pairwise(token)):
            for e, f in itertools.product(before, after):
                transitions[layer, e, f] += 1 / len(before) / len(after)
    np.testing.assert_allclose(load_LE(trace), load)
    np.testing.assert_allclose(coactivation_LEE(trace), together)
    np.testing.assert_allclose(transitions_LEE(trace), transitions / transitions.sum((1, 2), keepdims=True))
    ranks, by_rank = load_RLE(trace)
    assert ranks.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(by_rank.mean(0), load)
    np.testing.assert_allclose(by_rank[1], load_LE(trace.select(np.arange(60) % 4 == 1)))


def test_loads_of_gpus() -> None:
    load = np.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [0, 0, 0, 0]])
    placement = Placement(np.array([[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 1, 1]]), 2)
    np.testing.assert_allclose(load_LG(load, placement.gpu_LE, 2), [[0.5, 0.5], [0.75, 0.25], [0, 0]])
    np.testing.assert_allclose(imbalance_L(load_LG(load, placement.gpu_LE, 2)), [1, 1.5, 1])


def test_drift_is_told_from_chance() -> None:
    rng = np.random.default_rng(0)
    first, later = rng.integers(0, 4, (4000, 2, 1)), rng.integers(0, 4, (8000, 2, 1))
    later[4000:, 0] = 0  # in the last steps, all go to expert 0 of the first layer
    steps = np.repeat([5, 10, 15], 4000)
    trace = Trace(np.concatenate([first, later]), 4, step_S=steps)
    same_, other = drift(windows(trace, 3))
    assert (same_.first_step, same_.last_step, same_.tokens) == (10, 10, 4000)
    assert (same_.load, same_.transitions) == (
        pytest.approx(same_.load_noise, abs=0.02),
        pytest.approx(same_.transitions_noise, abs=0.02),
    )
    assert other.load == pytest.approx(0.75 / 2, abs=0.02)
    assert other.transitions == pytest.approx(0.75, abs=0.02)
    assert other.load_noise < 0.04
    assert [np.unique(window.step_S).tolist() for window in windows(trace, 2)] == [[5, 10], [15]]
    with pytest.raises(TraceError, match="which step had which token"):
        windows(Trace(first, 4), 2)


def test_trace_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = random_trace(400, 3, 2, 8)
    trace.expert_ids_SLK[:, 0] = [0, 1]  # two of GPU 0's
    trace.expert_ids_SLK[:, 1, 0] = 7
    trace.expert_ids_SLK[:, 1, 1] = 6
    save_trace(tmp_path / "trace.npz", trace)
    command = ["trace", "info", str(tmp_path / "trace.npz"), "--gpus", "4", "--json", str(tmp_path / "info.json")]
    assert main(command) == 0
    info = json.loads((tmp_path / "info.json").read_text())
    first = info["layers"][0]
    assert (first["layer"], first["unused"], first["experts_per_token"]) == (1, 6, 2)
    assert (first["expert_imbalance"], first["gpu_imbalance"]) == (4, 4)
    assert (first["next_guessed"], first["next_guessed_blindly"]) == (0.5, 0.5)
    assert (first["partner"], info["layers"][1]["partner"]) == (1, 1)
    assert info["layers"][2]["partner"] < 0.5
    assert (info["tokens"], info["experts"], info["sources"], len(info["steps"])) == (400, 8, [0, 1, 2, 3], 10)
    assert len(info["windows"]) == 8
    for window in info["windows"]:
        assert window["placed_here"] <= window["placed_at_first"] < window["contiguous"]
        assert window["drift"]["load"] == pytest.approx(window["drift"]["load_noise"], abs=0.1)
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("tokens: 400", "steps: 10, 0 to 9", "Since the first recorded steps"))

    # Layers 0 and 1 are alike for all ranks; in the last one, rank 0's tokens go to experts 0 and 1 now, others' not.
    trace.expert_ids_SLK[:, 2] = np.where((trace.source_S == 0)[:, None], [0, 1], [2, 3])
    save_trace(tmp_path / "trace.npz", trace)
    assert main(["trace", "info", str(tmp_path / "trace.npz"), "--json", str(tmp_path / "info.json")]) == 0
    at_0 = (trace.source_S == 0).mean()
    distance = json.loads((tmp_path / "info.json").read_text())["source_distance"]
    assert distance == pytest.approx((1 - at_0 + 3 * at_0) / 4 / 3)
    assert f"source ranks: 4, whose loads are {distance:.1%} from those of all" in capsys.readouterr().out

    assert main(["trace", "info", str(tmp_path / "trace.npz"), "--gpus", "3"]) == 2
    assert "--gpus = 3: must divide the trace's 8 experts" in capsys.readouterr().err
    assert main(["trace", "info", str(tmp_path / "none")]) == 1
    np.save(tmp_path / "ids.npy", trace.expert_ids_SLK[:, :1])
    assert main(["trace", "info", str(tmp_path / "ids.npy"), "--experts", "8"]) == 0
    assert "not recorded" in capsys.readouterr().out


# Recording ------------------------------------------------------------------------------------------------------------


def chosen_by_hand(config: Config) -> dict[int, np.ndarray]:
    """Rank → experts [tokens, layers, K] of its part of the first micro-batch, by one model's scores."""
    dp, tp = 2, config.parallel.tp
    model = Decoder(config)
    model.initialize(config.train.seed)
    inputs: list[torch.Tensor] = []
    for router in model.routers():
        router.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    chosen = {}
    for dp_rank in range(dp):
        loader = Loader(
            split=open_dataset(config.data).train,
            seq_len=config.data.seq_len,
            micro_batch=config.micro_batch(dp),
            accumulation=config.accumulation_steps(dp),
            dp_rank=dp_rank,
            dp_size=dp,
            seed=config.train.seed,
            end_of_document=None,
            mask_documents=False,
            prefetch=1,
            pin=False,
            start_sample=0,
        )
        inputs.clear()
        with torch.no_grad():
            model(next(iter(loader)).tokens_BS)
        loader.close()
        scores = [x.flatten(0, 1) @ r.weight.t() for x, r in zip(inputs, model.routers(), strict=True)]
        ids = torch.stack([s.topk(config.router.top_k).indices for s in scores], 1).numpy()
        for tp_rank, part in enumerate(np.split(ids, tp)):
            chosen[dp_rank * tp + tp_rank] = part
    return chosen


def test_four_ranks_record_what_an_independent_forward_pass_chooses(tmp_path: Path, data_folder: Path) -> None:
    """With activation checkpoints, whose second forward pass does not count; and the same steps train the same."""
    options = ["parallel.tp=2", "parallel.ep=2", "train.micro_batch=4", "train.activation_checkpointing.mode=full"]
    recording = [*options, "placement.trace.every=1", "placement.trace.tokens=1000"]
    config = config_of(tmp_path / "all", data_folder, *recording)
    seen = MockWorld(4).run(train_steps, config)
    trace = load_trace(tmp_path / "all")
    assert trace.step_S is not None
    assert trace.source_S is not None
    assert (trace.num_experts, trace.layers, trace.top_k) == (8, (1, 2), 3)
    assert Counter(trace.step_S.tolist()) == dict.fromkeys((1, 2, 3, 4, 5), 2 * 4 * 16)
    for rank, expected in chosen_by_hand(config).items():
        recorded = trace.select((trace.step_S == 1) & (trace.source_S == rank))
        assert np.array_equal(recorded.expert_ids_SLK, expected)

    # A sample: whole rows of the same, in their order, others on other ranks and steps.
    few = config_of(tmp_path / "few", data_folder, *recording[:-1], "placement.trace.tokens=9")
    again = MockWorld(4).run(train_steps, few)
    np.testing.assert_allclose([numbers[0] for numbers in again], [numbers[0] for numbers in seen], rtol=1e-9)
    sample = load_trace(tmp_path / "few")
    assert sample.num_tokens == 9 * 4 * 5
    places = set()
    for step, rank in itertools.product((1, 5), range(4)):
        rows, its = (
            part.select((part.step_S == step) & (part.source_S == rank)).expert_ids_SLK.reshape(-1, 6).tolist()
            for part in (trace, sample)
        )
        at = [-1]
        for row in its:
            at.append(rows.index(row, at[-1] + 1))
        places.add(tuple(at))
    assert len(places) > 4


@pytest.mark.parametrize("padded", [True, False])
def test_experts_of_tokens_that_have_more_or_fewer(padded: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen_TE = torch.rand(20, 6, generator=generator) < 0.4
    chosen_TE[7] = False
    chosen_TE[8] = True
    routing = Routing.from_mask(chosen_TE, chosen_TE.float(), 120)
    if not padded:
        routing = routing.trimmed()
    tokens = torch.tensor([0, 3, 7, 8, 19])
    ids = _experts_of(routing, tokens, 6)
    for row, token in zip(ids.tolist(), tokens.tolist(), strict=True):
        expected = chosen_TE[token].nonzero().flatten().tolist()
        assert row == [*expected, *[-1] * (6 - len(expected))]


def test_a_run_records_and_goes_on(tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Token rounding: other numbers of experts a token, of which none is lost."""
    options = ["placement.trace.every=3", "placement.trace.tokens=40", "router.rounding=up", "eval.every=0"]
    options += ["checkpoint.keep_every=3"]
    run(make_config(tmp_path / "run", data_folder, *options))
    names = sorted(file.name for file in (tmp_path / "run" / "trace").iterdir())
    assert names == [recording_name(3, 0), recording_name(6, 0)]
    trace = load_trace(tmp_path / "run")
    assert trace.expert_ids_SLK.shape[:2] == (80, 2)
    assert trace.expert_ids_SLK.shape[2] > 2
    assert load_LE(trace).sum(1) == pytest.approx((trace.expert_ids_SLK >= 0).sum((0, 2)) / 80)
    assert main(["trace", "info", str(tmp_path / "run"), "--gpus", "2"]) == 0
    assert "steps: 2, 3 to 6" in capsys.readouterr().out

    # From step 3 on again, recording to another folder, where a later step of another course lies.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for step in (1, 7):
        save_trace(elsewhere / recording_name(step, 1), trace)
    first = tmp_path / "run" / "checkpoints" / "step-00000003"
    again = make_config(
        tmp_path / "again", data_folder, *options, f"checkpoint.resume={first}", f"placement.trace.dir={elsewhere}"
    )
    run(again)
    assert sorted(file.name for file in elsewhere.iterdir()) == [recording_name(1, 1), recording_name(6, 0)]
    assert same(load_trace(elsewhere / recording_name(6, 0)), load_trace(tmp_path / "run" / "trace" / names[1]))


def test_later_recordings_are_dropped(tmp_path: Path) -> None:
    for name in [recording_name(9, 2), recording_name(10, 0), recording_name(100_000_000, 1), "mine.npz"]:
        (tmp_path / name).touch()
    drop_after(tmp_path, 9)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.npz", recording_name(9, 2)]
    drop_after(tmp_path / "none", 9)


def test_what_cannot_be_recorded(tmp_path: Path, data_folder: Path) -> None:
    for override, message in {
        "placement.trace.every=-1": "placement.trace.every = -1: must not be negative",
        "placement.trace.tokens=0": "placement.trace.tokens = 0: must be positive",
        "model.num_experts=0": "placement.trace.every = 1: a dense model",
    }.items():
        with pytest.raises(ConfigError, match=message):
            config_of(tmp_path, data_folder, "placement.trace.every=1", override)
