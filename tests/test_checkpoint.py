"""Checkpoints: exact contents, atomic commits, damage found and named, any number of ranks, errors on one of them."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from processes import wait_until
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain import checkpoint
from moetrain import checkpoint_shards as shards
from moetrain import checkpoint_staging as staging
from moetrain import checkpointer as saving
from moetrain.checkpoint import find_checkpoint, find_resume, latest, load, verify
from moetrain.checkpoint_shards import parts_of
from moetrain.checkpointer import Checkpointer, owned
from moetrain.errors import CheckpointError
from moetrain.parallel.agreement import on_all_ranks
from moetrain.parallel.mesh import Mesh, create_mesh, destroy_mesh
from moetrain.parallel.sharding import Sharding

EXPERTS = 4
PROGRESS = {"step": 3, "tokens": 12_345_678_901, "loss": 0.1 + 0.2, "config_hash": "abc"}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield create_mesh(device="cpu", timeout_minutes=1)
    destroy_mesh()


@pytest.fixture
def saver(tmp_path: Path, mesh: Mesh) -> Iterator[Callable[..., Checkpointer]]:
    """Makes checkpointers over tmp_path/"checkpoints"."""
    made = []

    def make(**options: object) -> Checkpointer:
        defaults = {"keep_last": 2, "keep_every": 0, "asynchronous": False}
        made.append(Checkpointer(tmp_path / "checkpoints", mesh, **(defaults | options)))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for checkpointer in made:
        checkpointer.close()


def example(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, 6, generator=generator)
    return {
        "float32": rows,
        "bfloat16": torch.randn(7, generator=generator).bfloat16(),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "int64": torch.randint(-(2**62), 2**62, (3,), generator=generator),
        "bool": torch.tensor([True, False, True]),
        "zero_dim": torch.tensor(3.25),
        "empty": torch.empty(0, 4),
        "transposed": rows.t(),
        "slice": rows[1:3, 2:4],
        "layers.0.norm": torch.nn.Parameter(torch.randn(4, generator=generator)),
    }


def like(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 1).detach() for name, tensor in tensors.items()}


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        a, b = left[name].detach().contiguous(), right[name].detach().contiguous()
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), name


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_is_exact(saver: Callable[..., Checkpointer], mesh: Mesh) -> None:
    checkpointer, tensors = saver(), example()
    checkpointer.save(3, tensors, PROGRESS)
    path = latest(checkpointer.folder)
    assert path is not None
    assert path.name == "step-00000003"
    assert verify(path) == []
    manifest = checkpoint.read_manifest(path)
    assert (manifest.step, manifest.progress, manifest.torch) == (3, PROGRESS, torch.__version__)
    for read_with in (mesh, None):
        loaded = like(tensors)
        assert load(path, loaded, read_with) == PROGRESS
        assert_same_bits(loaded, tensors)
    assert_same_bits(load_file(data_file(path)), tensors)  # by whoever reads safetensors


def test_nothing_in_a_checkpoint_is_run(saver: Callable[..., Checkpointer], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer, tensors = saver(), example()
    checkpointer.save(1, tensors, PROGRESS)

    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError("a pickle is loaded")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert load(checkpointer.folder / "step-00000001", like(tensors)) == PROGRESS


class Gate:
    """Closed, it holds up whoever writes a file; a test opens it, and leaves it open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        write_shard = saving.write_shard

        def late(*arguments: Any) -> Any:
            assert self._open.wait(timeout=20)
            return write_shard(*arguments)

        monkeypatch.setattr(saving, "write_shard", late)

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.clear()


def test_the_trainer_goes_on_while_saves_are_written(
    saver: Callable[..., Checkpointer], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer, gate = saver(asynchronous=True), Gate(monkeypatch)
    for steps_of_run in ((1,), (2, 3)):  # the second time into memory that the first has left, and with two at once
        gate.close()
        for step in steps_of_run:
            tensors, progress = example(seed=step), {"seen": [step]}
            checkpointer.save(step, tensors, progress)
            progress["seen"].append(3)
            checkpointer.wait_for_copies()
            assert not (checkpointer.folder / checkpoint.checkpoint_name(step)).exists()
            blank(tensors)
        assert checkpointer.take_stall() > 0
        assert checkpointer.take_stall() == 0
        gate.open()
        checkpointer.wait()
        for step in steps_of_run:
            path = checkpointer.folder / checkpoint.checkpoint_name(step)
            assert load(path, tensors) == {"seen": [step]}
            assert_same_bits(tensors, example(seed=step))


def test_memory_is_bounded_and_the_update_waits_for_it(
    saver: Callable[..., Checkpointer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "BLOCK_BYTES", 64)
    checkpointer, tensors, gate = saver(asynchronous=True, host_memory_bytes=3 * 64), example(), Gate(monkeypatch)
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    checkpointer.save(1, tensors, {})
    update = threading.Thread(target=lambda: (checkpointer.wait_for_copies(), blank(tensors)))
    update.start()
    update.join(timeout=0.3)
    assert update.is_alive()
    gate.open()
    update.join(timeout=20)
    checkpointer.save(2, like(tensors), {})
    checkpointer.wait()
    load(checkpointer.folder / "step-00000001", tensors)
    assert_same_bits(tensors, before)
    memory = checkpointer._stager._memory
    assert memory is not None
    assert memory._made == len(memory._free) == 3  # of the eight that the tensors fill


def test_a_rank_writes_several_files(saver: Callable[..., Checkpointer], monkeypatch: pytest.MonkeyPatch) -> None:
    """More than at once, of more blocks than there are; and when one cannot be written, the others do not wait."""
    monkeypatch.setattr(staging, "BLOCK_BYTES", 64)
    monkeypatch.setattr(shards, "FILE_BYTES", 100)
    checkpointer, tensors = saver(asynchronous=True, host_memory_bytes=2 * 64), example()
    for step in (1, 2):
        checkpointer.save(step, tensors, {})
    checkpointer.wait()
    path = checkpointer.folder / "step-00000002"
    manifest = checkpoint.read_manifest(path)
    assert len(manifest.files) > saving.FILES_AT_ONCE
    held = [load_file(path / name) for name in manifest.files]
    assert all(sum(tensor.nbytes for tensor in file.values()) <= 120 for file in held)  # the largest tensor
    assert_same_bits({name: tensor for file in held for name, tensor in file.items()}, tensors)

    # It fills both blocks.
    write_shard, failing = saving.write_shard, list(manifest.files)[["float32" in file for file in held].index(True)]

    def full(file: Path, *arguments: Any) -> Any:
        if file.name == failing:
            raise OSError(28, "No space left on device")
        return write_shard(file, *arguments)

    monkeypatch.setattr(saving, "write_shard", full)
    checkpointer.save(3, tensors, {})
    checkpointer.wait_for_copies()
    with pytest.raises(CheckpointError, match=r"step-00000003 failed: .*No space left"):
        checkpointer.wait()


def test_a_save_that_cannot_be_written_does_not_hold_the_update_up(
    saver: Callable[..., Checkpointer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "BLOCK_BYTES", 64)
    checkpointer = saver(asynchronous=True, host_memory_bytes=2 * 64)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        checkpointer.save(1, example(), {})
        checkpointer.wait_for_copies()
        wait_until(lambda: checkpointer.failed)
        with pytest.raises(CheckpointError, match=r"step-00000001 failed: .*File too large"):
            checkpointer.wait()
        assert not checkpointer.failed
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpointer.save(2, example(), {})
    checkpointer.wait()
    assert steps(checkpointer.folder) == ["step-00000002"]


def test_a_copy_that_fails_is_a_save_that_fails(
    saver: Callable[..., Checkpointer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(memory: object) -> None:
        raise RuntimeError("CUDA error: out of pinned memory")

    checkpointer = saver(asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr(staging.HostMemory, "take", fail)
        checkpointer.save(1, example(), {})
        checkpointer.wait_for_copies()
        with pytest.raises(CheckpointError, match=r"step-00000001 failed: RuntimeError: CUDA error: out of pinned"):
            checkpointer.wait()
    assert steps(checkpointer.folder) == []


def test_memory_for_two_checkpoints_but_half_of_what_is_free_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    block = staging.BLOCK_BYTES
    assert staging.default_limit(5 * block + 1) == 12 * block
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=80 * block))
    assert staging.default_limit(5 * block + 1) == 10 * block
    stager = staging.Stager(torch.device("cpu"), limit_bytes=None)
    for copy in stager.copy([[torch.ones(block + 1, dtype=torch.uint8)]] * 2):
        copy.drop()
    assert stager._memory is not None
    assert stager._memory.limit == 2 * 3  # of both, which are files of one checkpoint
    stager.close()


def test_keeps_the_last_and_every_nth(saver: Callable[..., Checkpointer]) -> None:
    checkpointer = saver(keep_last=2, keep_every=4)
    for step in range(1, 8):
        checkpointer.save(step, {"x": torch.tensor(step)}, {})
    assert steps(checkpointer.folder) == ["step-00000004", "step-00000006", "step-00000007"]


def test_a_step_that_is_saved_again_is_replaced(saver: Callable[..., Checkpointer]) -> None:
    checkpointer = saver(keep_last=1)
    for step, value in ((9, 1), (8, 2), (9, 3)):
        checkpointer.save(step, {"x": torch.tensor(value)}, {"value": value})
        path = checkpointer.folder / checkpoint.checkpoint_name(step)
        assert load(path, {"x": torch.tensor(0)}) == {"value": value}
        assert path.name in steps(checkpointer.folder)  # also step 8, though 9 is newer
    assert steps(checkpointer.folder) == ["step-00000009"]


def test_a_replaced_checkpoint_survives_a_kill_between_the_two_renames(
    saver: Callable[..., Checkpointer], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = saver()
    checkpointer.save(1, {"x": torch.tensor(1)}, {"value": 1})
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError("killed here")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(CheckpointError, match=r"step-00000001 failed.*killed here"):
            checkpointer.save(1, {"x": torch.tensor(2)}, {"value": 2})
    path = latest(checkpointer.folder, checksums=True)
    assert path is not None
    assert load(path, {"x": torch.tensor(0)}) == {"value": 1}
    checkpointer.save(1, {"x": torch.tensor(3)}, {"value": 3})
    assert steps(checkpointer.folder) == ["step-00000001"]


@pytest.mark.parametrize(
    ("module", "stage"),
    [(saving, "new_aside"), (saving, "write_shard"), (checkpoint, "write_manifest"), (checkpoint, "fsync_folder")],
)
def test_an_error_while_writing_leaves_the_earlier_checkpoint(
    saver: Callable[..., Checkpointer], monkeypatch: pytest.MonkeyPatch, module: ModuleType, stage: str
) -> None:
    checkpointer = saver(asynchronous=True)
    checkpointer.save(1, example(), {})
    checkpointer.wait()

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, stage, fail)
        checkpointer.save(2, example(), {})
        with pytest.raises(CheckpointError, match=r"step-00000002 failed: .*No space left") as caught:
            checkpointer.wait()
    assert "rank 0" not in str(caught.value)  # there is no other
    assert caught.value.agreed
    assert steps(checkpointer.folder) == ["step-00000001"]
    checkpointer.save(2, example(), {})
    checkpointer.save(3, example(), {})
    checkpointer.wait()
    assert steps(checkpointer.folder) == ["step-00000002", "step-00000003"]


KILLED = """
import sys, time
from pathlib import Path
import torch
from moetrain import checkpoint
from moetrain.checkpointer import Checkpointer
from moetrain.parallel.mesh import create_mesh

checkpointer = Checkpointer(
    Path(sys.argv[1]), create_mesh(device="cpu"), keep_last=2, keep_every=0, asynchronous=True
)
checkpointer.save(1, {"x": torch.ones(1000)}, {})
checkpointer.wait()
write_manifest = checkpoint.write_manifest

def half_way(path, manifest):
    write_manifest(path, manifest)
    print("half way", flush=True)
    time.sleep(60)

checkpoint.write_manifest = half_way
checkpointer.save(2, {"x": torch.zeros(1000)}, {})
checkpointer.wait()
"""


def test_kill_in_the_middle_of_a_save(saver: Callable[..., Checkpointer], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half way\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(steps(folder)) == 2  # one of them aside
    assert latest(folder, checksums=True) == folder / "step-00000001"
    checkpointer = saver()
    assert steps(folder) == ["step-00000001"]
    checkpointer.save(2, {"x": torch.zeros(1000)}, {})
    assert latest(folder) == folder / "step-00000002"


def data_file(path: Path) -> Path:
    (file,) = path.glob("*.safetensors")
    return file


def truncate(path: Path) -> Path:
    file = data_file(path)
    os.truncate(file, file.stat().st_size - 1)
    return file


def flip(file: Path, place: int | None = None) -> Path:
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    file.write_bytes(content)
    return file


def delete(file: Path) -> Path:
    file.unlink()
    return file


def edit_manifest(path: Path) -> Path:
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"step": ', '"step": 1'))
    return file


def other_format(path: Path) -> Path:
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 99}))
    return file


def break_json(path: Path) -> Path:
    file = path / "manifest.json"
    file.write_text(file.read_text()[:-10])
    return file


DAMAGES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated": (truncate, r"\d+ bytes instead of \d+"),
    "flipped bit": (lambda path: flip(data_file(path)), "SHA-256 is wrong"),
    "flipped bit in the header": (lambda path: flip(data_file(path), 20), "SHA-256 is wrong"),
    "deleted": (lambda path: delete(data_file(path)), "missing"),
    "manifest deleted": (lambda path: delete(path / "manifest.json"), "missing"),
    "manifest broken": (break_json, "unreadable: JSONDecodeError"),
    "manifest edited": (edit_manifest, "SHA-256 is wrong"),
    "manifest of a later format": (other_format, "format 99"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_and_passed_over(saver: Callable[..., Checkpointer], mesh: Mesh, damage: str) -> None:
    checkpointer = saver()
    checkpointer.save(1, example(), {"step": 1})
    checkpointer.save(2, example(), {"step": 2})
    first, second = (checkpointer.folder / f"step-0000000{step}" for step in (1, 2))
    apply, message = DAMAGES[damage]
    file = apply(second)

    problems = verify(second)
    assert len(problems) == 1
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(problems[0])
    assert str(file) in problems[0]

    with pytest.warns(UserWarning, match=f"skipping the damaged checkpoint {second}: .*{message}"):
        assert find_resume(checkpointer.folder, "auto", mesh) == first
    with pytest.raises(CheckpointError, match=message) as caught:
        find_resume(checkpointer.folder, str(second), mesh)
    assert str(file) in str(caught.value)

    apply(first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
            find_resume(checkpointer.folder, "auto", mesh)


def test_loading_a_damaged_checkpoint_is_one_line(saver: Callable[..., Checkpointer], mesh: Mesh) -> None:
    checkpointer, tensors = saver(), example()
    checkpointer.save(1, tensors, {})
    path = checkpointer.folder / "step-00000001"
    os.truncate(data_file(path), 100)
    for read_with in (mesh, None):
        with pytest.raises(CheckpointError, match=r"step-00000001: its files cannot be read: ") as caught:
            load(path, like(tensors), read_with)
        assert "Traceback" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_where_a_run_starts(saver: Callable[..., Checkpointer], mesh: Mesh, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert find_resume(folder, "auto", mesh) is None
    assert find_resume(folder, "never", mesh) is None
    checkpointer = saver()
    assert find_resume(folder, "auto", mesh) is None
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        find_resume(folder, str(folder), mesh)
    for step in (1, 2):
        checkpointer.save(step, example(), {})
    assert find_resume(folder, "auto", mesh) == folder / "step-00000002"
    for path in (tmp_path, folder, folder / "step-00000002"):
        assert find_resume(tmp_path / "new run", str(path), mesh) == folder / "step-00000002"
    assert find_checkpoint(folder / "step-00000001") == folder / "step-00000001"
    with pytest.raises(CheckpointError, match=r"choose another run\.dir or checkpoint\.resume=auto"):
        find_resume(folder, "never", mesh)
    with pytest.raises(CheckpointError, match="nowhere: no such folder; give auto, never, or the path"):
        find_resume(folder, str(tmp_path / "nowhere"), mesh)
    with pytest.raises(CheckpointError, match=r"checkpoint\.resume = False: no such folder; give auto, never, or"):
        find_resume(folder, "False", mesh)


def test_a_file_in_place_of_the_run_folder(mesh: Mesh, saver: Callable[..., Checkpointer], tmp_path: Path) -> None:
    for file in (tmp_path / "run", tmp_path / "checkpoints"):
        file.touch()
    message = r"run\.dir: .*/{} is a file, not a folder; move it away or choose another"
    for resume in ("auto", "never", str(tmp_path)):
        with pytest.raises(CheckpointError, match=message.format("run")):
            find_resume(tmp_path / "run" / "checkpoints", resume, mesh)
    with pytest.raises(CheckpointError, match=message.format("checkpoints")):
        saver()


def test_an_abandoned_course_is_superseded(saver: Callable[..., Checkpointer], mesh: Mesh) -> None:
    checkpointer = saver(keep_last=9)

    def course(value: int, *numbers: int) -> None:
        for step in numbers:
            checkpointer.save(step, {"x": torch.tensor(value)}, {"value": value})

    course(1, 1, 2, 3)
    (checkpointer.folder / "step-00000003.old").mkdir()  # replaced, by a run that was killed before it deleted it
    saver()
    assert latest(checkpointer.folder) == checkpointer.folder / "step-00000003"
    for value in (1, 2):  # the second time it replaces what is superseded already
        checkpointer = saver(resumed_step=1, keep_last=9)
        assert steps(checkpointer.folder) == ["step-00000001", "step-00000002.superseded", "step-00000003.superseded"]
        assert find_resume(checkpointer.folder, "auto", mesh) == checkpointer.folder / "step-00000001"
        aside = checkpointer.folder / "step-00000003.superseded"
        assert find_resume(checkpointer.folder, str(aside), mesh) == aside
        assert load(aside, {"x": torch.tensor(0)}) == {"value": value}
        course(2, 3)


def test_tensors_of_another_model(saver: Callable[..., Checkpointer], mesh: Mesh) -> None:
    checkpointer, tensors = saver(), {f"layer.{n}": torch.ones(2, 3) for n in range(6)}
    checkpointer.save(1, tensors, {})
    path = checkpointer.folder / "step-00000001"

    def refuse(wanted: dict[str, Tensor], message: str, strict: bool = True) -> None:
        before = {name: tensor.clone() for name, tensor in wanted.items()}
        with pytest.raises(CheckpointError, match=message):
            load(path, wanted, mesh, strict=strict)
        assert_same_bits(wanted, before)

    zeros = like(tensors)
    refuse(zeros | {"extra": torch.zeros(1)}, "another model: it lacks extra. Use the config")
    refuse(zeros | {"extra": torch.zeros(1)}, "it lacks extra", strict=False)
    refuse({}, r"it has, unasked, layer.0; layer.1; layer.2 \(and 3 more\)")
    refuse(zeros | {"layer.1": torch.zeros(3, 2)}, r"it holds layer.1 \[2, 3\] torch.float32, wanted \[3, 2\] torch.fl")
    refuse(zeros | {"layer.1": torch.zeros(2, 3).bfloat16()}, r"layer.1 \[2, 3\] torch.float32, wanted .*bfloat16")

    part = {"layer.4": torch.zeros(2, 3)}
    load(path, part, mesh, strict=False)
    assert_same_bits(part, {"layer.4": tensors["layer.4"]})


def test_progress_must_be_json(saver: Callable[..., Checkpointer]) -> None:
    checkpointer = saver()
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpointer.save(1, example(), {"path": Path()})
    assert steps(checkpointer.folder) == []


def test_nothing_is_said_on_the_way(
    saver: Callable[..., Checkpointer], mesh: Mesh, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tensors = example()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpointer = saver(asynchronous=True)
        for _ in range(2):
            checkpointer.save(1, tensors, {})
            checkpointer.wait()
        load(checkpointer.folder / "step-00000001", like(tensors), mesh)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


# --------------------------------------------------------------------------------------------- several processes


def experts() -> dict[str, Tensor]:
    return {
        "w_gate_up": torch.arange(EXPERTS * 6 * 5, dtype=torch.float32).view(EXPERTS, 6, 5),
        "w_down": -torch.arange(EXPERTS * 15, dtype=torch.float32).bfloat16().view(EXPERTS, 5, 3),
    }


def sharded(whole: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    sharding = Sharding(mesh.experts, 0)
    return {name: sharding.logical(sharding.part(tensor).clone()) for name, tensor in whole.items()}


def locally(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        for tensor in locally(tensors).values():
            tensor.fill_(1)
    return tensors


def four_ranks(folder: Path, _: Path) -> None:
    """Save with ep = 2, edp = 2; then meet errors on one rank alone."""
    mesh = create_mesh(ep=2, device="cpu", timeout_minutes=2)
    whole = example() | experts()
    tensors = example() | sharded(experts(), mesh)
    checkpointer = Checkpointer(folder, mesh, keep_last=2, keep_every=0, asynchronous=True)
    copied = sum(part.bytes for part, _ in parts_of(owned(tensors, mesh)))
    copies = on_all_ranks(lambda: copied, mesh.host_group)
    assert sum(copies) == sum(tensor.nbytes for tensor in whole.values()), copies  # nothing twice
    assert min(copies) > 0, copies

    checkpointer.save(1, tensors, PROGRESS)
    checkpointer.wait_for_copies()
    blank(tensors)
    checkpointer.wait()
    assert find_resume(folder, "auto", mesh) == folder / "step-00000001"
    load(folder / "step-00000001", tensors, mesh)
    assert_same_bits(locally(tensors), locally(example() | sharded(experts(), mesh)))

    hashed: list[str] = []
    sha256 = checkpoint.sha256
    checkpoint.sha256 = lambda file: hashed.append(file.name) or sha256(file)  # type: ignore[func-returns-value]
    assert find_resume(folder, "auto", mesh) == folder / "step-00000001"
    checkpoint.sha256 = sha256
    shares = on_all_ranks(lambda: hashed, mesh.host_group)
    assert sorted(file for share in shares for file in share) == [
        f"rank-0000{rank}-00.safetensors" for rank in range(4)
    ]
    assert all(len(share) == 1 for share in shares)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mesh.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    checkpointer.save(2, tensors, PROGRESS)
    checkpointer.save(3, tensors, PROGRESS)  # by itself worth trying
    with pytest.raises(CheckpointError, match="step-00000002 failed: rank 1: ") as caught:
        checkpointer.wait()
    assert caught.value.agreed
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if mesh.rank == 0:  # which cleans up
        assert steps(folder) == ["step-00000001"]
    checkpointer.save(4, tensors, PROGRESS)
    checkpointer.close()

    there = folder / "step-00000004" if mesh.rank != 2 else folder / "elsewhere"
    with pytest.raises(CheckpointError, match=r"elsewhere/manifest\.json: missing"):
        load(there, tensors, mesh)
    with pytest.raises(CheckpointError, match=r"checkpoint.resume = never"):
        find_resume(folder, "never", mesh)
    file = folder / "step-00000004" / "rank-00003-00.safetensors"
    if mesh.rank == 0:
        content = file.read_bytes()
        flip(file)
    dist.barrier(mesh.host_group)
    with warnings.catch_warnings(record=True) as said:
        assert find_resume(folder, "auto", mesh) == folder / "step-00000001"
    assert len(said) == (mesh.rank == 0)
    with pytest.raises(
        CheckpointError, match=r"step-00000004 is damaged: .*rank-00003-00\.safetensors: its SHA-256"
    ) as caught:
        find_resume(folder, str(folder / "step-00000004"), mesh)
    assert caught.value.agreed
    if mesh.rank == 0:
        file.write_bytes(content)


def two_ranks(folder: Path, other: Path) -> None:
    """Load what four ranks saved with ep = 2 and what one process saved; ep = 1 and ep = 2 here."""
    mesh = create_mesh(ep=2, device="cpu", timeout_minutes=2)
    for tensors, path in (
        (example() | sharded(experts(), mesh), folder / "step-00000004"),
        (example() | sharded(experts(), mesh), other / "step-00000001"),
        (example() | sharded(experts(), replace(mesh, ep=1, experts=_ep1(mesh))), folder / "step-00000004"),
        (example() | experts(), folder / "step-00000004"),
    ):
        expected = {name: tensor.detach().clone() for name, tensor in locally(tensors).items()}
        assert load(path, blank(tensors), mesh) == PROGRESS
        assert_same_bits(locally(tensors), expected)


def _ep1(mesh: Mesh) -> torch.distributed.DeviceMesh:
    return torch.distributed.DeviceMesh("cpu", torch.arange(mesh.world_size).view(1, -1), mesh_dim_names=("ep", "edp"))


def on_gpus(folder: Path, _: Path) -> None:
    """Save from GPUs, experts spread over all, while the tensors change; load with another ep."""
    world_size = int(os.environ["WORLD_SIZE"])
    mesh = create_mesh(ep=world_size, device="cuda", timeout_minutes=2)

    def tensors() -> dict[str, Tensor]:
        dense = {name: tensor.to(mesh.device) for name, tensor in example().items()}
        dense["large"] = torch.arange(1 << 26, dtype=torch.float32, device=mesh.device)
        return dense | sharded({name: tensor.to(mesh.device) for name, tensor in experts().items()}, mesh)

    live, expected = tensors(), locally(tensors())
    checkpointer = Checkpointer(folder, mesh, keep_last=2, keep_every=0, asynchronous=True)
    for step in (1, 2):
        checkpointer.save(step, live, PROGRESS)
        checkpointer.wait_for_copies()
        blank(live)  # on the stream
        checkpointer.wait()
        memory = checkpointer._stager._memory
        assert memory is not None
        assert all(block.is_pinned() for block in memory._free)
        assert len(memory._free) == memory._made > 2
        assert checkpointer.take_stall() > 0
        assert load(folder / checkpoint.checkpoint_name(step), live, mesh) == PROGRESS
        assert_same_bits(locally(live), expected)
    checkpointer.close()
    whole = blank(locally(tensors()) | {name: tensor.to(mesh.device) for name, tensor in experts().items()})
    load(folder / "step-00000002", whole, mesh)
    for name, tensor in experts().items():
        assert_same_bits({name: whole[name].cpu()}, {name: tensor})


def test_any_number_of_ranks(saver: Callable[..., Checkpointer], mesh: Mesh, tmp_path: Path) -> None:
    folder = tmp_path / "by four ranks"
    run_ranks(4, four_ranks, folder, tmp_path)
    path = latest(folder, checksums=True)
    assert path == folder / "step-00000004"
    manifest = checkpoint.read_manifest(path)
    assert (manifest.world_size, manifest.ep) == (4, 2)
    assert len(manifest.files) == 4
    held = [load_file(path / name) for name in manifest.files]
    first, second = (next(file for file in held if f"w_down[{rows},0:5,0:3]" in file) for rows in ("0:2", "2:4"))
    rows = torch.cat([first["w_down[0:2,0:5,0:3]"], second["w_down[2:4,0:5,0:3]"]])
    assert_same_bits({"w_down": rows}, {"w_down": experts()["w_down"]})

    whole = example() | experts()
    plain, shards = like(whole), blank(example() | sharded(experts(), mesh))
    assert load(path, plain) == PROGRESS
    assert_same_bits(plain, whole)
    load(path, shards, mesh)
    assert_same_bits(locally(shards), whole)

    checkpointer = saver()
    checkpointer.save(1, example() | sharded(experts(), mesh), PROGRESS)
    run_ranks(2, two_ranks, folder, checkpointer.folder)


@pytest.mark.parametrize(
    "gpus", [pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.gpu2)], ids=lambda n: f"{n} GPU"
)
def test_gpus(gpus: int, tmp_path: Path) -> None:
    run_ranks(gpus, on_gpus, tmp_path / "checkpoints", tmp_path)
    assert verify(tmp_path / "checkpoints" / "step-00000002") == []
