"""A first level of storage before the run folder: what is brought there, what is left out, what a killed run left."""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import wait_until
from torch import Tensor

from moetrain import checkpoint_levels
from moetrain.checkpoint import Manifest, checkpoint_name, checkpoints_in, find_resume, load, read_manifest, verify
from moetrain.checkpoint_levels import LocalLevel, Uploads
from moetrain.checkpointer import Checkpointer
from moetrain.errors import CheckpointError
from moetrain.parallel.mesh import Mesh, create_mesh
from moetrain.parallel.mock import MockWorld, RankError
from moetrain.parallel.sharding import Sharding

RANKS = 2


def tensors_of(step: int, mesh: Mesh) -> dict[str, Tensor]:
    """One that is split, and some that are not."""
    whole = torch.arange(12.0).view(4, 3) + step
    return {
        "split": Sharding(mesh.experts, 0).logical(whole.chunk(RANKS)[mesh.rank].clone()),
        **{f"whole.{n}": torch.full((5,), float(step + n)) for n in range(3)},
    }


class Job:
    """One rank of a run that has a first level."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.mesh = create_mesh(ep=RANKS, device="cpu", timeout_minutes=1)
        self.checkpoints = folder / "run" / "checkpoints"
        self.local = folder / "local"
        level = LocalLevel(self.local, self.checkpoints, self.mesh)
        level.bring_up()
        self.resumed = find_resume(self.checkpoints, "auto", self.mesh)
        defaults: dict[str, Any] = {"keep_last": 9, "keep_every": 0, "asynchronous": True}
        self.checkpointer = Checkpointer(self.checkpoints, self.mesh, **(defaults | options), local=level)

    def save(self, *steps: int) -> None:
        """Return when they are on the first level, and their uploads have been offered."""
        for step in steps:
            self.checkpointer.save(step, tensors_of(step, self.mesh), {"step": step})
            self.checkpointer.wait_for_copies()
            for save in self.checkpointer._pending:
                save.result(timeout=20)

    def saved(self) -> list[int]:
        return sorted(step for step, _ in checkpoints_in(self.checkpoints))

    def on_first_level(self) -> list[int]:
        return sorted(step for step, _ in checkpoints_in(self.checkpointer._local.folder))  # type: ignore[union-attr]


def run(job: Callable[[Path], Any], folder: Path) -> Any:
    return MockWorld(RANKS, timeout=20).run(job, folder)[0]


@pytest.fixture
def left_by_a_killed_run(tmp_path: Path) -> None:
    """Step 1 is in the run folder, steps 2 and 3 are on the first level alone."""
    offer = Uploads.offer

    def only_the_first(self: Uploads, manifest: Manifest) -> None:
        if manifest.step == 1:
            offer(self, manifest)

    def job(folder: Path) -> None:
        job = Job(folder)
        job.save(1)
        job.checkpointer.wait()
        job.save(2, 3)
        job.checkpointer.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Uploads, "offer", only_the_first)
        run(job, tmp_path)


def test_checkpoints_come_to_the_run_folder(tmp_path: Path) -> None:
    def job(folder: Path) -> None:
        job = Job(folder)
        job.save(1, 2)
        job.checkpointer.wait()
        assert job.saved()[-1] == 2
        assert job.on_first_level() == []  # of a run that has ended nothing is left
        path = job.checkpoints / checkpoint_name(2)
        assert verify(path) == []
        loaded = tensors_of(0, job.mesh)
        assert load(path, loaded, job.mesh) == {"step": 2}
        for name, tensor in tensors_of(2, job.mesh).items():
            left, right = (t.to_local() if name == "split" else t for t in (tensor, loaded[name]))  # type: ignore[attr-defined]
            assert torch.equal(left, right), name
        job.checkpointer.close()

    run(job, tmp_path)


@pytest.mark.parametrize(("keep_every", "brought"), [(0, [1, 4]), (3, [1, 3, 4])])
def test_what_the_run_folder_is_too_slow_for_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_every: int, brought: list[int]
) -> None:
    slow, bring = threading.Event(), checkpoint_levels.bring

    def late(*arguments: Any) -> None:
        assert slow.wait(timeout=20)
        bring(*arguments)

    monkeypatch.setattr(checkpoint_levels, "bring", late)

    def job(folder: Path) -> None:
        job = Job(folder, keep_every=keep_every)
        job.save(1, 2)
        assert job.on_first_level() == [1, 2]  # 1 is on its way
        if keep_every == 0:
            job.save(3)
            assert job.on_first_level() == [1, 3]
            job.save(4)
        assert job.saved() == []
        dist.barrier(job.mesh.host_group)
        slow.set()
        if keep_every:
            job.save(3, 4)
        job.checkpointer.wait()
        assert job.saved() == brought
        job.checkpointer.close()

    run(job, tmp_path)


@pytest.mark.usefixtures("left_by_a_killed_run")
def test_what_a_killed_run_left_is_brought_when_it_goes_on(tmp_path: Path) -> None:

    def job(folder: Path) -> Path | None:
        job = Job(folder)
        assert job.saved() == [1, 3]
        assert verify(job.checkpoints / checkpoint_name(3)) == []
        job.checkpointer.close()
        return job.resumed

    assert run(job, tmp_path) == tmp_path / "run" / "checkpoints" / checkpoint_name(3)


def resumed_step(folder: Path) -> int:
    job = Job(folder)
    job.checkpointer.close()
    assert job.resumed is not None
    return read_manifest(job.resumed).step


@pytest.mark.usefixtures("left_by_a_killed_run")
def test_a_machine_that_is_gone_takes_its_part_along(tmp_path: Path) -> None:
    (lost,) = (tmp_path / "local").glob("*/*/rank-00001")
    shutil.rmtree(lost)
    assert run(resumed_step, tmp_path) == 1


@pytest.mark.usefixtures("left_by_a_killed_run")
def test_damage_on_the_first_level_is_named_and_passed_over(tmp_path: Path) -> None:
    (file,) = (tmp_path / "local").glob(f"*/*/rank-00001/{checkpoint_name(3)}/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert run(resumed_step, tmp_path) == 2
    (warning,) = said
    assert str(warning.message) == (
        f"skipping the damaged checkpoint of step 3: {file}: its SHA-256 is wrong, the file was altered"
    )


@pytest.mark.usefixtures("left_by_a_killed_run")
def test_what_an_earlier_attempt_left_elsewhere_is_not_used(tmp_path: Path) -> None:
    """It was on another machine meanwhile, and comes back to one where an older course had got further."""
    (tmp_path / "local").rename(tmp_path / "other machine")
    assert run(resumed_step, tmp_path) == 1
    shutil.rmtree(tmp_path / "local")
    (tmp_path / "other machine").rename(tmp_path / "local")
    assert run(resumed_step, tmp_path) == 1


def test_an_upload_that_fails_is_a_save_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_levels, "_copy_file", full)

    def job(folder: Path) -> None:
        job = Job(folder)
        job.save(1)
        wait_until(lambda: job.checkpointer.failed)
        with pytest.raises(CheckpointError, match=r"run/checkpoints/step-00000001 failed: .*No space left") as caught:
            job.checkpointer.wait()
        assert caught.value.agreed
        assert job.saved() == []
        assert job.on_first_level() == [1]
        job.checkpointer.close()

    run(job, tmp_path)
    monkeypatch.undo()
    assert run(resumed_step, tmp_path) == 1


def test_a_first_level_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "local").touch()
    with pytest.raises(RankError) as caught:
        run(resumed_step, tmp_path)
    assert "checkpoint.local_dir" in str(caught.value)
