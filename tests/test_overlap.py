"""The halves of a micro-batch in turn: in which order, and that numbers are those of the whole.

tests/test_topologies.py has the parity of whole trainings for every topology; here is what it leaves out.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import MODELS, assert_same, config_of, train
from torch import Tensor

from moetrain.config import from_dict, load_config, to_yaml
from moetrain.model import Attention, Decoder, Experts
from moetrain.parallel import AllToAllDispatcher, Phases, complete, create_mesh, weave
from moetrain.parallel.mock import MockWorld
from moetrain.parallel.overlap import _communication_stream
from moetrain.placement.trace import load_trace

CPU = torch.device("cpu")


class Note(torch.autograd.Function):
    """x, noting in a list when it passes, and in another when its gradient does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, event: str, forward: list[str], backward: list[str]) -> Tensor:
        ctx.event, ctx.backward = event, backward
        forward.append(event)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.backward.append(ctx.event)
        return grads[0], None, None, None


def noting(half: str, x: Tensor, forward: list[str], backward: list[str]) -> Phases[Tensor]:
    for layer in range(2):
        x = Note.apply(x, f"{half} communicates {layer}", forward, backward)
        yield x
        x = Note.apply(x.sin(), f"{half} computes {layer}", forward, backward)
        yield x
    return Note.apply(x, f"{half} ends", forward, backward)


def test_halves_take_turns_and_the_backward_pass_returns_the_same_way() -> None:
    forward: list[str] = []
    backward: list[str] = []
    x = torch.ones(2, requires_grad=True)
    first, second = weave([noting(half, x, forward, backward) for half in "AB"], x, CPU)
    assert forward == [
        *("A communicates 0", "A computes 0", "B communicates 0", "B computes 0"),
        *("A communicates 1", "A computes 1", "B communicates 1", "B computes 1"),
        *("A ends", "B ends"),
    ]
    (first.sum() + second.sum()).backward()
    assert backward == forward[::-1]
    alone = complete(noting("A", x, [], []))
    assert torch.equal(first, alone)
    assert torch.equal(second, alone)


class Streams:
    """In place of torch.cuda: writes down what is asked of its streams."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = "computing"

    def current_stream(self) -> Stream:
        return Stream("computing", self.log)

    def Stream(self, priority: int) -> Stream:
        return Stream("communicating", self.log)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.current = stream.name
        yield
        self.current = "computing"


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> str:
        return self.log[-1] if self.log else "the start"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.name)


def test_each_phase_is_on_its_stream_and_waits_for_its_own_half(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams()
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)

    def half(name: str) -> Phases[str]:
        for phase in range(2):
            streams.log.append(f"{name}{phase} {streams.current}")
            yield
        streams.log.append(f"{name}2 {streams.current}")
        return name

    try:
        assert weave([half("A"), half("B")], None, torch.device("meta")) == ["A", "B"]
    finally:
        _communication_stream.cache_clear()
    assert streams.log == [
        *("communicating waits for the start", "A0 communicating", "computing waits for communicating", "A1 computing"),
        *("communicating waits for the start", "B0 communicating", "computing waits for communicating", "B1 computing"),
        *("communicating waits for A1 computing", "A2 communicating"),
        *("communicating waits for B1 computing", "B2 communicating"),
        "computing waits for communicating",
    ]


_events = threading.local()


def note_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on attention, experts, dispatch and combine note which half passes, in lists of the thread."""

    def noted(name: str, half: Callable[..., str], place: int = 0) -> Callable[..., Any]:
        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(self: Any, *arguments: Any) -> Any:
                event = f"{name} {half(*arguments)}"
                x = Note.apply(arguments[place], event, _events.forward, _events.backward)
                return function(self, *arguments[:place], x, *arguments[place + 1 :])

            return call

        return wrap

    def by_tokens(tokens: int) -> str:
        _events.last = "A" if tokens == 32 else "B"  # of 2 sequences and of 1, of 16 tokens
        return _events.last

    events: list[tuple[type, str, Callable[..., str]]] = [
        (Attention, "forward", lambda x, *_: by_tokens(x.shape[0] * x.shape[1])),
        (AllToAllDispatcher, "dispatch", lambda x, _: by_tokens(x.shape[0])),
        (Experts, "forward", lambda *_: _events.last),
        (AllToAllDispatcher, "combine", lambda _, dispatched: by_tokens(dispatched.way_back.rows.num_tokens)),
    ]
    for owner, method, half in events:
        name = {"forward": owner.__name__.lower()}.get(method, method)
        monkeypatch.setattr(owner, method, noted(name, half)(getattr(owner, method)))


def gradients_in_order() -> tuple[list[str], list[str]]:
    mesh = create_mesh(ep=2, device="cpu")
    _events.forward, _events.backward = [], []
    config = config_of(Path("run"), Path("data"), *MODELS["qwen"], "parallel.ep=2", "parallel.overlap=on")
    model = Decoder(config, mesh)
    model.initialize(0)
    tokens_BS = torch.arange(3 * 16).view(3, 16)
    hidden_BSD, stats = model.train()(tokens_BS)
    (hidden_BSD.square().sum() + sum(layer.balance_loss for layer in stats)).backward()
    return _events.forward, _events.backward


def test_each_collective_has_the_other_halfs_computation_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    note_events(monkeypatch)
    layer = ["attention A", "attention B", "dispatch A", "experts A", "dispatch B", "experts B"]
    between = ["combine A", "attention A", "combine B", "attention B"]
    for forward, backward in MockWorld(2).run(gradients_in_order):
        assert forward == [*layer, *between, *layer[2:], "combine A", "combine B"]
        assert backward == forward[::-1]


@pytest.mark.parametrize(
    "overrides",
    [
        # The loss counts both halves before it multiplies, and the step's earlier micro-batches.
        ["parallel.ep=2", "router.balance_scope=rank", "train.micro_batch=4"],
        ["parallel.ep=2", "router.balance_scope=global", "train.micro_batch=4"],
        ["parallel.ep=2", "parallel.tp=2", "router.balance_scope=rank", "train.micro_batch=4"],
        # Halves of two sequences and of one, and the other way round.
        ["parallel.ep=2", "router.balance_scope=rank", "train.micro_batch=3", "train.tokens_per_step=96"],
        ["parallel.tp=2", "router.balance_scope=sequence", "train.micro_batch=6", "train.tokens_per_step=96"],
        ["parallel.tp=2", "train.micro_batch=6", "train.tokens_per_step=96", "parallel.overlap_split=1"],
    ],
)
def test_losses_and_metrics_are_those_of_the_whole_micro_batch(
    overrides: list[str], tmp_path: Path, data_folder: Path
) -> None:
    off, on = (
        config_of(tmp_path / overlap, data_folder, *overrides, "router.z_weight=0.1", f"parallel.overlap={overlap}")
        for overlap in ("off", "on")
    )
    expected, *_ = MockWorld(2).run(train, off)
    assert_same(MockWorld(2).run(train, on), expected)
    for there, here in zip(metrics(tmp_path / "on"), metrics(tmp_path / "off"), strict=True):
        of_routing = [name for name in here if name.startswith(("moe/", "placement/", "loss"))]
        assert len(of_routing) > 10
        assert {name: there[name] for name in of_routing} == pytest.approx({name: here[name] for name in of_routing})


def metrics(folder: Path) -> list[dict[str, float]]:
    """Of the steps."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "grad_norm" in record]


def hidden_of_documents(*overrides: str) -> Tensor:
    mesh = create_mesh(tp=2, device="cpu")
    config = config_of(Path("run"), Path("data"), *MODELS["qwen"], "parallel.tp=2", *overrides)
    model = Decoder(config, mesh)
    model.initialize(0)
    generator = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(256, (8, 16), generator=generator)
    documents_BS = torch.randint(2, (8, 16), generator=generator).cumsum(1)
    return model.train()(tokens_BS, documents_BS)[0]


def test_each_half_has_the_documents_of_its_sequences() -> None:
    off, *others = (
        MockWorld(2).run(hidden_of_documents, *overrides)
        for overrides in ([], ["parallel.overlap=on"], ["parallel.overlap=on", "parallel.overlap_split=1"])
    )
    for on in others:
        torch.testing.assert_close(on, off, rtol=1e-12, atol=0)


def test_a_recording_has_the_first_half(tmp_path: Path, data_folder: Path) -> None:
    recording = ["parallel.ep=2", "train.micro_batch=4", "placement.trace.every=1", "placement.trace.tokens=1000"]
    whole, half = (
        config_of(tmp_path / overlap, data_folder, *recording, f"parallel.overlap={overlap}")
        for overlap in ("off", "on")
    )
    ids_SLK = []
    for config in (whole, half):
        MockWorld(2).run(train, config)
        trace = load_trace(config.trace_folder)
        assert trace.step_S is not None
        assert trace.source_S is not None
        ids_SLK.append(trace.select((trace.step_S == 1) & (trace.source_S == 1)).expert_ids_SLK)
    assert len(ids_SLK[0]) == 4 * 16
    assert ids_SLK[1].tolist() == ids_SLK[0][: 2 * 16].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("overrides", [["parallel.ep=2"], ["parallel.tp=2"], ["parallel.tp=2", "parallel.ep=2"]])
def test_on_the_streams_of_a_gpu(overrides: list[str], tmp_path: Path, data_folder: Path) -> None:
    """Two ranks on one GPU share its streams."""
    float64 = ["kernels.experts=reference", "run.device=cuda", "router.balance_scope=sequence", "train.micro_batch=4"]
    off, on = (
        config_of(tmp_path / overlap, data_folder, *overrides, *float64, f"parallel.overlap={overlap}")
        for overlap in ("off", "on")
    )
    expected, *_ = MockWorld(2, "cuda").run(train, off)
    assert_same(MockWorld(2, "cuda").run(train, on), expected)


@pytest.mark.parametrize(
    ("written", "read"), [("on", "on"), ("off", "off"), ("true", "on"), ("no", "off"), ("auto", "auto")]
)
def test_overlap_is_read_as_people_write_it(written: str, read: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"parallel:\n  overlap: {written}\n")
    config = load_config(str(file))
    assert config.parallel.overlap == from_dict({}, [f"parallel.overlap={written}"]).parallel.overlap == read
    file.write_text(to_yaml(config))
    assert load_config(str(file), [f"run.dir={config.run.dir}"]) == config


def test_without_ranks_to_talk_to_nothing_is_split() -> None:
    assert not from_dict({"parallel": {"overlap": "on"}}).parallel.weaves
    assert from_dict({"parallel": {"overlap": "on", "ep": 2}}).parallel.weaves
