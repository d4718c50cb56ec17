"""From a profile to what was computed, communicated and exposed, and the picture of it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comparison import config_of, train
from matplotlib import image
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from moetrain import communication_meter
from moetrain.benchmarks.profile_overlap import Step, layers_named, profile_overlap
from moetrain.cli import main
from moetrain.communication_meter import CommunicationMeter
from moetrain.model import Decoder
from moetrain.parallel import create_mesh
from moetrain.parallel.mock import MockWorld
from moetrain.timeline import Activity, Span, merged, recorded, timeline, total, traced, with_layers, without
from moetrain.timeline_plot import draw_timelines
from moetrain.trainer import Trainer


def random_spans(seed: random.Random) -> list[Span]:
    starts = [seed.randrange(40) for _ in range(seed.randrange(8))]
    return [(start, start + seed.randrange(1, 9)) for start in starts]


def test_spans_are_sets_of_times() -> None:
    seed = random.Random(0)
    for _ in range(500):
        one, other = random_spans(seed), random_spans(seed)
        covered = [{t for start, end in spans for t in range(int(start), int(end))} for spans in (one, other)]
        left = without(merged(one), merged(other))
        assert {t for start, end in left for t in range(int(start), int(end))} == covered[0] - covered[1]
        assert total(left) == len(covered[0] - covered[1])
        assert total(merged(one)) == len(covered[0])
        assert all(end < start for (_, end), (start, _) in zip(merged(one), merged(one)[1:], strict=False))


@pytest.mark.parametrize(
    ("name", "communicates"),
    [
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", True),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", True),
        ("exchange_add_rmsnorm_forward_kernel", True),
        ("add_rmsnorm_forward_kernel", False),
        ("Memcpy PtoP (Device -> Device)", True),
        ("Memcpy DtoD (Device -> Device)", False),
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNN", False),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", False),
    ],
)
def test_what_communicates(name: str, communicates: bool) -> None:
    assert Activity(name, 7, 0, 1).communicates is communicates


def test_exposed_is_what_no_computation_covers() -> None:
    activities = [
        Activity("gemm", 7, 0, 10, layer=0),
        Activity("ncclA", 18, 6, 14, layer=0),  # 4 of 8 exposed
        Activity("gemm", 7, 20, 25, layer=1),
        Activity("ncclB", 18, 21, 24, layer=1),  # hidden
        Activity("ncclC", 18, 26, 28),  # all exposed, of no layer
        Activity("gemm", 7, 30, 40, layer=1, backward=True),
        Activity("ncclD", 18, 38, 41, layer=1, backward=True),  # 1 of 3
    ]
    found = timeline(activities)
    assert found.exposed == [(10, 14), (26, 28), (40, 41)]
    assert found.exposed_by_layer == {0: 4, 1: 1}
    assert found.layers == [(0, False, 0, 10), (1, False, 20, 25), (1, True, 30, 40)]
    assert found.figures() == {
        "span_ms": 41,
        "compute_ms": 25,
        "communication_ms": 16,
        "exposed_ms": 7,
        "idle_ms": 9,
        "hidden": 9 / 16,
        "kernels": 7,
    }
    assert set(timeline([]).figures().values()) == {0.0}


def test_each_micro_batch_has_its_layers() -> None:
    passes = [(0, False), (1, False), (1, True), (0, True), (0, False), (1, False), (1, True), (0, True)]
    activities = [Activity("gemm", 7, t, t + 1, layer, backward) for t, (layer, backward) in enumerate(passes)]
    assert timeline(activities).layers == [(layer, back, t, t + 1) for t, (layer, back) in enumerate(passes)]


def trace_of_a_step(tmp_path: Path) -> tuple[dict[str, Any], list[tuple[int | None, bool]]]:
    """A real profile of two layers on a CPU, in which every product launches a kernel; and whose they are. The backward
    pass is moved to a thread of its own, as it is for a GPU."""
    first, second, head = (torch.randn(8, 8, requires_grad=True) for _ in range(3))
    x = torch.randn(4, 8, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for number, weight in enumerate((first, second)):
            with record_function(f"layer {number}"):
                x = torch.mm(x, weight).relu()
                x.detach()  # sees the number that the next product takes
        torch.mm(x, head).sum().backward()
    file = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(file))
    trace = json.loads(file.read_text())
    events = trace["traceEvents"]
    start = min(event["ts"] for event in events if event.get("name", "").startswith("autograd::engine"))
    for event in events:
        if event.get("cat") == "cpu_op" and event["ts"] >= start:
            event["tid"] = 99
    products = sorted((event for event in events if event.get("name") == "aten::mm"), key=lambda event: event["ts"])
    for number, event in enumerate(products):
        launch = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": event["ts"] + 0.01, "dur": 1.0}
        kernel = {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 1e9 + 1000 * number, "dur": 500.0, "tid": 7}
        # Profilers tell the operation of most kernels, and of others the launch.
        named = {"External id": event["args"]["External id"]} if number % 2 else {}
        events.append({**launch, "tid": event["tid"], "args": {"correlation": number}})
        events.append({**kernel, "args": {"correlation": number, **named}})
    # Forward; then for each layer the gradients of its weight and of its input.
    expected: list[tuple[int | None, bool]] = [(0, False), (1, False), (None, False)]
    return trace, [*expected, *2 * [(None, False)], *2 * [(1, True)], *2 * [(0, True)]]


def test_layers_are_those_of_the_host(tmp_path: Path) -> None:
    trace, expected = trace_of_a_step(tmp_path)
    activities = traced(trace)
    assert [(a.layer, a.backward) for a in activities] == expected
    assert [(a.start, a.end) for a in activities] == [(t, t + 0.5) for t in range(len(expected))]
    without_host = copy.deepcopy(trace)
    without_host["traceEvents"] = [e for e in trace["traceEvents"] if e.get("cat") in ("kernel", "cuda_runtime")]
    assert len(traced(without_host)) == len(expected)
    assert {a.layer for a in traced(without_host)} == {None}


def test_layers_of_one_profile_are_given_to_the_times_of_another() -> None:
    labelled = [Activity(name, 7, t, t + 1, layer=t // 2) for t, name in enumerate(["gemm", "norm", "gemm", "norm"])]
    labelled.append(Activity("nccl", 18, 0, 1, layer=5))
    timed = [Activity(name, 7, 10 + t, 11 + t) for t, name in enumerate(["gemm", "norm", "gemm", "norm"])]
    timed.append(Activity("nccl", 18, 10.5, 11))
    given = with_layers(timed, labelled)
    assert [(a.start, a.layer) for a in given] == [(10, 0), (10.5, 5), (11, 0), (12, 1), (13, 1)]
    # A kernel that the other one did not have has no layer, and the others keep theirs.
    more = [*timed, Activity("copy", 7, 11.5, 11.6), Activity("copy", 3, 0, 1)]
    assert [(a.name, a.layer) for a in with_layers(more, labelled)] == [
        *(("copy", None), ("gemm", 0), ("nccl", 5), ("norm", 0), ("copy", None), ("gemm", 1), ("norm", 1)),
    ]


def test_a_cpu_has_recorded_nothing() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.ones(3).sum()
    assert recorded(profiler) == []


def test_the_picture(tmp_path: Path) -> None:
    layers = [Activity("gemm", 7, t, t + 0.9, layer=t // 2, backward=t >= 4) for t in range(8)]
    shown = {
        "off": timeline([*layers, Activity("nccl", 7, 8, 11)]),
        "on": timeline([*layers, Activity("nccl", 18, 6, 8.5)]),
    }
    file = tmp_path / "overlap.png"
    draw_timelines(shown, "two timelines", file)
    pixels = image.imread(file)[..., :3]
    blue, orange, red = (
        (abs(pixels - torch.tensor([int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)]).numpy()).max(-1) < 0.02).sum(1)
        for c in ("#2f6db3", "#d9902a", "#c0392b")
    )
    half = len(pixels) // 2
    assert blue[:half].sum() == pytest.approx(blue[half:].sum(), rel=0.1)
    # All three milliseconds are exposed in the first panel; in the second a good half one of the two and a half.
    assert red[:half].sum() == pytest.approx(orange[:half].sum(), rel=0.1)
    assert red[half:].sum() < 0.4 * orange[half:].sum()
    assert [file.name for file in tmp_path.iterdir()] == ["overlap.png"]


def ranges_of_a_step(model: Decoder) -> dict[str, int]:
    """How often each range was entered."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model.train()(torch.arange(64).view(4, 16))
    return {event.key: event.count for event in profiler.key_averages() if event.key.startswith("layer ")}


def test_ranges_of_layers_are_there_while_they_are_asked_for() -> None:
    for overlap, halves in (("off", 1), ("on", 2)):
        config = config_of(Path("run"), Path("data"), "parallel.ep=2", f"parallel.overlap={overlap}")
        model = Decoder(config)
        model.initialize(0)
        with layers_named(model):
            assert ranges_of_a_step(model) == {f"layer {n}": 5 * halves for n in range(3)}  # its phases
        assert ranges_of_a_step(model) == {}


def draw_overlap(out: Path, data: Path) -> None:
    """With a recorder that makes up what a GPU would have done."""
    config = config_of(out.parent / "run", data, "parallel.ep=2", "train.micro_batch=4", "train.tokens_per_step=128")
    trainer = Trainer(config, create_mesh(ep=2, device="cpu"))
    lengths = iter([4.0, 9.0, 5.0, 1.0] * 2)

    def record(step: Step, with_host: bool) -> list[Activity]:
        step()
        end = next(lengths)
        start = 3.0 if trainer.model.config.parallel.weaves else 4.0
        computed = [Activity("gemm", 7, 2 * n, 2 * n + 2, layer=n if with_host else None) for n in range(2)]
        return [*computed, Activity("nccl", 18, start, end, layer=1 if with_host else None)]

    profile_overlap(trainer, config, out, 3, record)
    trainer.checkpointer.close()


def test_profile_overlap_draws_the_median_step(tmp_path: Path, data_folder: Path) -> None:
    out = tmp_path / "pictures" / "overlap.png"
    MockWorld(2).run(draw_overlap, out, data_folder)
    assert image.imread(out).shape[2] in (3, 4)
    rows = {row["name"]: row for row in json.loads(out.with_suffix(".json").read_text())["rows"]}
    for name, communication in (("off", 1.0), ("on", 2.0)):
        row = rows[name]
        assert (row["span_ms"], row["communication_ms"], row["exposed_ms"]) == (5.0, communication, 1.0)
        assert row["exposed_ms_by_layer"] == {"0": 0.0, "1": 1.0}
        assert row["spans_ms"]["exposed"] == [[4.0, 5.0]]
        assert row["layers"] == [[0, "forward", 0.0, 2.0], [1, "forward", 2.0, 4.0]]
        assert row["step_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.png"], "there is nothing to hide"),
        (["--out", "x.jpeg", "parallel.ep=2"], "--out x.jpeg: is a picture; its name ends in .png"),
        (["--out", "x.png", "parallel.ep=2", "train.activation_checkpointing.mode=full"], "not with this train.activ"),
        (["--out", "x.png", "parallel.ep=2", "train.micro_batch=1"], "two or more whole sequences"),
        ([], "--out"),
    ],
)
def test_profile_overlap_says_what_it_needs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["profile", "overlap", "tiny", *arguments]) == 2
    assert message in capsys.readouterr().err


class Kineto:
    """An event of a profiler on a GPU."""

    def __init__(self, name: str, start: int, duration: int, stream: int = 7, kind: Any = DeviceType.CUDA) -> None:
        self.name, self.start_ns, self.duration_ns = (lambda: name), (lambda: start), (lambda: duration)
        self.device_resource_id, self.device_type = (lambda: stream), (lambda: kind)
        self.is_user_annotation = lambda: name.startswith("##")


def test_the_meter_counts_kernels_of_the_steps_that_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    log = []

    class Profiler:
        def __init__(self, activities: list[ProfilerActivity]) -> None:
            assert activities == [ProfilerActivity.CUDA]
            events = [
                Kineto("gemm", 10**9, 4 * 10**6),
                Kineto("ncclDevKernel", 10**9 + 3 * 10**6, 3 * 10**6, 18),
                Kineto("##range", 10**9, 10**9),
                Kineto("aten::mm", 0, 10**9, kind=DeviceType.CPU),
            ]
            self.profiler = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events))

        def start(self) -> None:
            log.append("start")

        def stop(self) -> None:
            log.append("stop")

    @contextmanager
    def paused() -> Iterator[None]:
        log.append("(")
        yield
        log.append(")")

    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(CommunicationMeter, "_synchronize", lambda self: log.append("sync"))
    monkeypatch.setattr(communication_meter.dist, "all_reduce", lambda tensor, group: tensor.mul_(2))
    mesh: Any = SimpleNamespace(device=torch.device("cuda"), world_size=2, host_group=None)
    config = config_of(Path("run"), Path("data"), "metrics.communication_every=3")
    meter = CommunicationMeter(config, mesh, SimpleNamespace(paused=paused))  # type: ignore[arg-type]
    assert meter.report() == {}
    for number in range(1, 7):
        with meter.step(number):
            log.append(f"step {number}")
    recording = ["sync", "(", "start", ")", "step 3", "sync", "(", "stop", ")", "(", ")"]
    assert log[: 2 + len(recording)] == ["step 1", "step 2", *recording]
    assert meter.report() == {
        "time_metrics/communication(s)": pytest.approx(3e-3),
        "time_metrics/exposed_communication(s)": pytest.approx(2e-3),
    }
    assert meter.report() == {}


def test_on_a_cpu_there_is_no_such_metric(tmp_path: Path, data_folder: Path) -> None:
    config = config_of(tmp_path / "run", data_folder, "parallel.ep=2", "metrics.communication_every=1")
    MockWorld(2).run(train, config)
    records = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "grad_norm" in records
    assert "communication" not in records


@pytest.mark.gpu2
def test_on_gpus_there_is(tmp_path: Path, data_folder: Path) -> None:
    from ranks import run_ranks

    overrides = ["parallel.ep=2", "metrics.communication_every=2", "run.device=cuda", "kernels.experts=reference"]
    config = config_of(tmp_path / "run", data_folder, *overrides)
    run_ranks(2, train, config)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {r["step"]: r for r in records if "time_metrics/communication(s)" in r}
    assert list(found) == [2, 4]
    for record in found.values():
        exposed, communication = (record[f"time_metrics/{kind}communication(s)"] for kind in ("exposed_", ""))
        assert 0 < exposed <= communication < record["time_metrics/end_to_end(s)"]
