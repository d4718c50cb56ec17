"""The choice among kernel configurations, its file, and the count of compilations."""

from __future__ import annotations

import json
import logging
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.kernels import autotune
from moetrain.kernels.compilations import Compilations

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402


@dataclass(frozen=True)
class Tile:
    """What a kernel would be launched with."""

    BLOCK: int
    num_warps: int = 4
    sides: tuple[int, ...] = (1, 2)


SLOW, FAST, MEDIUM = Tile(64), Tile(128), Tile(256)
TILES = [SLOW, FAST, MEDIUM]
MILLISECONDS = {SLOW: [3.0], FAST: [9.0, 1.0, 1.1, 0.9, 8.0, 1.0], MEDIUM: [0.1, 2.0]}
"""Of each launch, the last again and again: the first is not timed, and the median forgives an outlier."""


class FakeTimer:
    """Runs the work at once; its time is what it returns."""

    def __init__(self) -> None:
        self.times: list[Any] = []

    def queue(self, work: Callable[[], object]) -> None:
        self.times.append(work())

    def milliseconds(self) -> list[Any]:
        times, self.times = self.times, []
        return times


class Kernel:
    """A kernel that takes MILLISECONDS."""

    def __init__(self, *, failing: tuple[Tile, ...] = (), error: Exception | None = None) -> None:
        self.launches: list[Tile] = []
        self.failing = failing
        self.error = error or RuntimeError("out of shared memory")

    def __call__(self, tile: Tile) -> float:
        self.launches.append(tile)
        if tile in self.failing:
            raise self.error
        times = MILLISECONDS[tile]
        return times[min(self.launches.count(tile), len(times)) - 1]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Autotuning on, into tmp_path, on a machine with a GPU whose clock is FakeTimer's."""
    machine = types.SimpleNamespace(gpu="GPU 1", capturing=False, file=tmp_path / "cache" / autotune.FILE_NAME)
    monkeypatch.setattr(autotune, "_can_time", lambda: True)
    monkeypatch.setattr(autotune, "_gpu_name", lambda: machine.gpu)
    monkeypatch.setattr(autotune, "_capturing", lambda: machine.capturing)
    monkeypatch.setattr(autotune, "_Timer", FakeTimer)
    machine.restart = lambda: autotune.configure(True, tmp_path / "cache")
    machine.restart()
    return machine


@pytest.fixture(autouse=True)
def off_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_tuner", None)


def test_off_it_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    assert autotune.choose("up", (1,), TILES, kernel) is SLOW
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    autotune.configure(True)
    assert autotune.choose("up", (1,), TILES, kernel) is SLOW
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    autotune.configure(True)
    assert autotune.choose("up", (1,), TILES, kernel) is SLOW
    assert kernel.launches == []
    with pytest.raises(ValueError, match="up: no configuration"):
        autotune.choose("up", (1,), [], kernel)


def test_the_fastest_is_timed_once_and_kept(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    kernel = Kernel()
    with caplog.at_level(logging.INFO):
        assert autotune.choose("up", (4096, torch.bfloat16), TILES, kernel) == FAST
    assert len(kernel.launches) == 3 * (1 + autotune.REPEATS)
    assert kernel.launches[3:6] == TILES, "in turns"
    assert [record.getMessage() for record in caplog.records] == [
        "autotuned up (4096, torch.bfloat16): BLOCK=64: 3.000 ms, BLOCK=128: 1.000 ms *, BLOCK=256: 2.000 ms"
    ]
    again = Kernel()
    assert autotune.choose("up", (4096, torch.bfloat16), TILES, again) == FAST
    assert again.launches == []
    for name, key in (("down", (4096, torch.bfloat16)), ("up", (8192, torch.bfloat16)), ("up", (4096, torch.float16))):
        again = Kernel()
        assert autotune.choose(name, key, TILES, again) == FAST
        assert again.launches, (name, key)


def test_one_candidate_is_not_timed(machine: Any) -> None:
    kernel = Kernel()
    assert autotune.choose("up", (1,), [MEDIUM], kernel) is MEDIUM
    assert kernel.launches == []


def test_what_cannot_run_is_passed_over(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert autotune.choose("up", (1,), TILES, Kernel(failing=(SLOW, FAST))) == MEDIUM
    assert "BLOCK=64: failed (RuntimeError), BLOCK=128: failed (RuntimeError), BLOCK=256: 2.000 ms *" in caplog.text
    assert autotune.choose("up", (2,), TILES, Kernel(failing=tuple(TILES))) is SLOW
    assert " (2,)" not in machine.file.read_text(), "nothing won"


@pytest.mark.parametrize("error", [torch.AcceleratorError("illegal memory access"), torch.OutOfMemoryError("full")])
def test_errors_that_no_other_candidate_survives(machine: Any, error: Exception) -> None:
    with pytest.raises(type(error)):
        autotune.choose("up", (1,), TILES, Kernel(failing=(FAST,), error=error))


def test_a_later_process_reads_the_file(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    key = (4096, torch.bfloat16, (1, 2))
    autotune.choose("up", key, TILES, Kernel())
    assert sorted(path.name for path in machine.file.parent.iterdir()) == [autotune.FILE_NAME]
    content = json.loads(machine.file.read_text())
    assert list(content["winners"].values()) == [{"BLOCK": 128, "num_warps": 4, "sides": [1, 2]}]

    def timed() -> bool:
        machine.restart()
        kernel = Kernel()
        assert autotune.choose("up", key, TILES, kernel) == FAST
        return bool(kernel.launches)

    assert not timed()
    with monkeypatch.context() as patch:
        patch.setattr(machine, "gpu", "GPU 2")
        assert timed()
        assert not timed()
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "0.0")
        assert timed()
    with monkeypatch.context() as patch:
        patch.setattr(autotune, "__version__", "0.0")
        assert timed()
    assert not timed()
    assert len(json.loads(machine.file.read_text())["winners"]) == 4


def test_a_winner_that_is_no_candidate_any_more(machine: Any) -> None:
    for restart in (lambda: None, machine.restart):
        machine.file.unlink(missing_ok=True)
        machine.restart()
        assert autotune.choose("up", (1,), TILES, Kernel()) == FAST
        restart()
        kernel = Kernel()
        assert autotune.choose("up", (1,), [SLOW, MEDIUM], kernel) == MEDIUM
        assert kernel.launches


def test_processes_share_the_file(machine: Any) -> None:
    autotune.choose("up", (1,), TILES, Kernel())
    other = autotune._Tuner(machine.file)
    other.choose("up", (2,), TILES, Kernel())
    before = machine.file.read_text()
    with machine.file.open() as reader:
        autotune.choose("up", (3,), TILES, Kernel())
        assert reader.read() == before, "who has opened the file reads it to its end"
    assert len(json.loads(machine.file.read_text())["winners"]) == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"format": "moetrain autotune 1", "winners": {"up',
        "[1, 2]",
        '{"format": "another", "winners": {}}',
        '{"format": "moetrain autotune 1", "winners": [1]}',
        "\udcff",
    ],
)
def test_another_file_is_ignored_with_a_warning(machine: Any, text: str, caplog: pytest.LogCaptureFixture) -> None:
    machine.file.parent.mkdir()
    machine.file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert autotune.choose("up", (1,), TILES, Kernel()) == FAST
    assert f"{machine.file}: ignored" in caplog.text
    caplog.clear()
    machine.restart()
    kernel = Kernel()
    assert autotune.choose("up", (1,), TILES, kernel) == FAST
    assert (kernel.launches, caplog.text) == ([], "")


@pytest.mark.parametrize("value", [None, 7, {"BLOCK": 128}, {"BLOCK": "128", "num_warps": 4, "sides": [1, 2]}])
def test_another_value_in_the_file_is_ignored(machine: Any, value: Any) -> None:
    autotune.choose("up", (1,), TILES, Kernel())
    content = json.loads(machine.file.read_text())
    content["winners"] = dict.fromkeys(content["winners"], value)
    machine.file.write_text(json.dumps(content))
    machine.restart()
    kernel = Kernel()
    assert autotune.choose("up", (1,), TILES, kernel) == FAST
    assert kernel.launches


def test_a_folder_that_cannot_be_written(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    machine.file.parent.write_text("a file where the folder should be")
    for key in (1, 2):
        assert autotune.choose("up", (key,), TILES, Kernel()) == FAST
    assert caplog.text.count("cannot be written") == 1
    kernel = Kernel()
    assert autotune.choose("up", (1,), TILES, kernel) == FAST
    assert kernel.launches == []


def test_an_interrupted_write_leaves_the_file_as_it_was(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    autotune.choose("up", (1,), TILES, Kernel())
    before = machine.file.read_bytes()

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(autotune.json, "dump", killed)
    with pytest.raises(KeyboardInterrupt):
        autotune.choose("up", (2,), TILES, Kernel())
    assert machine.file.read_bytes() == before
    assert [path.name for path in machine.file.parent.iterdir()] == [autotune.FILE_NAME]


def test_nothing_is_timed_inside_a_graph(machine: Any) -> None:
    machine.capturing = True
    kernel = Kernel()
    assert autotune.choose("up", (1,), TILES, kernel) is SLOW
    assert kernel.launches == []
    machine.capturing = False
    assert autotune.choose("up", (1,), TILES, kernel) == FAST
    machine.capturing = True
    assert autotune.choose("up", (1,), TILES, kernel) == FAST, "what is known already costs nothing"


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert autotune.cache_folder() == tmp_path / "moetrain"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert autotune.cache_folder() == tmp_path / "home" / ".cache" / "moetrain"


# Compilations


def compiled(seconds: float, *, cache_hit: bool = False) -> None:
    """What triton.compile does at its end."""
    listener = knobs.compilation.listener
    if listener is not None:
        microseconds = int(seconds * 1e6)
        times = knobs.CompileTimes(ir_initialization=0, lowering_stages=[("ttir", microseconds)], store_results=0)
        listener(src=None, metadata={}, metadata_group={}, times=times, cache_hit=cache_hit)


def test_compilations_are_counted() -> None:
    compilations = Compilations()
    for _ in range(2):
        compiled(1.5)
    compiled(7.0, cache_hit=True)
    assert compilations.stop() == "compiled 2 kernels in 3.0 s, 1 from cache"
    assert knobs.compilation.listener is None
    compiled(1.5)
    assert compilations.compiled == 2
    assert compilations.stop() is None
    assert Compilations().stop() is None


def test_other_listeners_hear_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[dict[str, Any]] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **arguments: heard.append(arguments))
    before = knobs.compilation.listener
    first, second = Compilations(), Compilations()
    compiled(0.25)
    assert first.stop() == second.stop() == "compiled 1 kernel in 0.2 s, 0 from cache"
    compiled(0.25)
    compiled(0.25, cache_hit=True)
    assert [set(arguments) for arguments in heard] == 3 * [{"src", "metadata", "metadata_group", "times", "cache_hit"}]
    assert [(counted.compiled, counted.from_cache) for counted in (first, second)] == [(1, 0), (1, 0)]
    monkeypatch.setattr(knobs.compilation, "listener", before)


def test_nothing_to_count_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    compilations = Compilations()
    assert knobs.compilation.listener is None
    assert compilations.stop() is None


@pytest.mark.skipif(sys.platform != "linux", reason="triton compiles for NVIDIA GPUs there")
def test_what_triton_says_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # or it warns
    source = ASTSource(JITFunction(_one), {"out": "*fp32"})
    compilations = Compilations()
    for _ in range(2):
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    compilations.stop()
    assert (compilations.compiled, compilations.from_cache) == (1, 1)
    assert 0 < compilations.seconds < 60


def _one(out):  # type: ignore[no-untyped-def]
    tl.store(out, 1.0)


# On a GPU


@triton.jit
def _square(x, out, depth, REPEATS: tl.constexpr):
    """out = xᵀ x of x [depth, 128] by one program, so often; a stage of its pipeline takes 32 KiB of shared memory."""
    column = tl.arange(0, 128)
    for _ in range(REPEATS):
        total = tl.zeros((128, 128), tl.float32)
        for start in range(0, depth, 64):
            row = start + tl.arange(0, 64)
            left = tl.load(x + row[None, :] * 128 + column[:, None])
            right = tl.load(x + row[:, None] * 128 + column[None, :])
            total = tl.dot(left, right, total)
        tl.store(out + column[:, None] * 128 + column[None, :], total)


@dataclass(frozen=True)
class SquareConfig:
    REPEATS: int
    num_stages: int


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(4096, 128, device="cuda", dtype=torch.float16)
    out = torch.empty(128, 128, device="cuda")
    slow, fast, impossible = SquareConfig(50, 3), SquareConfig(1, 3), SquareConfig(1, 16)

    def launch(config: SquareConfig) -> None:
        _square[(1,)](x, out, len(x), **vars(config))

    autotune.configure(True, tmp_path)
    compilations = Compilations()
    with caplog.at_level(logging.INFO):
        assert autotune.choose("square", (12,), [slow, impossible, fast], launch) == fast
    compilations.stop()
    assert compilations.compiled + compilations.from_cache == 3
    assert "num_stages=16: failed (OutOfResources)" in caplog.text
    expected = x.double().t() @ x.double()
    assert (out - expected).norm() < 1e-4 * expected.norm()  # exact products, sums of 4096 in float32 that may truncate

    autotune.configure(True, tmp_path)
    assert autotune.choose("square", (12,), [slow, impossible, fast], lambda _: pytest.fail("known")) == fast

    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert autotune.choose("square", (13,), [slow, fast], lambda _: pytest.fail("capturing")) == slow
        launch(slow)
