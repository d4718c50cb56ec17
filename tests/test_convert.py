"""`moetrain checkpoint`: what it says about checkpoints, and safetensors that lose nothing on the way and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moetrain import convert
from moetrain.checkpoint import checkpoint_name, contents, load, read_manifest, verify
from moetrain.checkpoint_commands import parts
from moetrain.cli import main
from moetrain.config import Config, from_dict
from moetrain.convert import INDEX, from_safetensors, to_safetensors
from moetrain.errors import CheckpointError
from moetrain.flops import parameters
from moetrain.trainer import train

VALUES: dict[str, Any] = {
    "model": {"dim": 32, "n_layers": 2, "n_heads": 2, "num_experts": 4, "expert_dim": 32, "shared_dim": 16}
    | {"first_dense_layers": 1, "qk_norm": "head"},
    "router": {"score": "sigmoid", "normalize": True, "bias_update_rate": 0.01},
    "data": {"seq_len": 32},
    "train": {"steps": 6, "tokens_per_step": 512, "micro_batch": 4},
    "checkpoint": {"every": 4},
    "eval": {"every": 0, "tokens": 512},
    "metrics": {"every": 1, "console": "none"},
    "run": {"device": "cpu"},
}


def config(folder: Path, data: Path, *overrides: str) -> Config:
    return from_dict(VALUES, [f"run.dir={folder}", f"data.path={data}", *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Path:
    """A run of six steps with checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("converted") / "run"
    assert train(config(folder, data_folder)) == 0
    return folder


def tensors_of(path: Path) -> dict[str, Tensor]:
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in contents(path).items()}
    load(path, tensors)
    return tensors


def files_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def losses(folder: Path) -> dict[int, float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    name = "loss_metrics/global_avg_loss"
    return {record["step"]: record[name] for record in records if name in record}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def test_there_and_back_a_run_goes_on_the_same(run: Path, tmp_path: Path, data_folder: Path) -> None:
    source = run / "checkpoints" / checkpoint_name(4)
    folder, back = tmp_path / "safetensors", tmp_path / "back"
    limit = 300_000
    assert to_safetensors(source, folder, file_bytes=limit) == source
    index = json.loads((folder / INDEX).read_text())
    saved = tensors_of(source)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in saved.values())
    assert index["weight_map"].keys() == saved.keys()
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, 1 + len(files))
    ]
    assert len(files) > 2
    for file in files:
        held = load_file(file)
        assert {name for name, where in index["weight_map"].items() if where == file.name} == held.keys()
        assert sum(tensor.nbytes for tensor in held.values()) <= limit
    assert_same(files_of(folder), saved)

    from_safetensors(folder, back)
    assert verify(back) == []
    assert_same(tensors_of(back), saved)
    before, after = read_manifest(source), read_manifest(back)
    assert (after.step, after.progress, after.ep) == (before.step, before.progress, before.ep)
    assert train(config(tmp_path / "again", data_folder, f"checkpoint.resume={back}")) == 0
    assert losses(tmp_path / "again") == {step: loss for step, loss in losses(run).items() if step > 4}


def test_a_tensor_larger_than_a_file_has_one_of_its_own(run: Path, tmp_path: Path) -> None:
    to_safetensors(run, tmp_path / "out", file_bytes=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(
        contents(run / "checkpoints" / checkpoint_name(6))
    )


def test_weights_only_in_another_dtype(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["checkpoint", "convert", str(run), "--out", str(out), "--weights-only", "--dtype", "bfloat16"]) == 0
    newest = run / "checkpoints" / checkpoint_name(6)
    assert capsys.readouterr().out == f"{out}: safetensors of {newest}\n"
    expected = {
        name: tensor if name.endswith("router.bias") else tensor.bfloat16()
        for name, tensor in tensors_of(newest).items()
        if name.startswith("model.")
    }
    assert any(name.endswith("router.bias") for name in expected)
    assert_same(files_of(out), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights_only": True}, "holds no optimiser state, so no run can go on from it; convert the checkpoint again"),
        ({"dtype": torch.bfloat16}, "its weights were cast to bfloat16, so no run can go on from it"),
    ],
)
def test_what_cannot_become_a_checkpoint_again(
    run: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    to_safetensors(run, tmp_path / "folder", **options)
    with pytest.raises(CheckpointError, match=message):
        from_safetensors(tmp_path / "folder", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damage_is_found_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    to_safetensors(run, folder)
    file = folder / "model-00001-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: .*model-00001-of-00001\.safetensors: its SHA-256 is wrong"):
        from_safetensors(folder, tmp_path / "out")
    (folder / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json: not an index that `moetrain checkpoint convert` wrote"):
        from_safetensors(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_nothing_is_overwritten_and_nothing_half_is_left(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    for write in (to_safetensors, from_safetensors):
        with pytest.raises(CheckpointError, match=r"there: exists already; choose another name"):
            write(run, tmp_path / "there")
        with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere; make it first"):
            write(run, tmp_path / "nowhere" / "out")

    def full(*arguments: object, **options: object) -> None:
        Path(str(arguments[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "save_file", full)
    with pytest.raises(CheckpointError, match=r"--out .*out: cannot be written: .*No space left on device"):
        to_safetensors(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_parts_are_the_parameters(run: Path, data_folder: Path) -> None:
    held = parts(contents(run / "checkpoints" / checkpoint_name(6)))
    count = parameters(config(run, data_folder))
    assert set(held) == {
        *("embedding and head", "attention", "dense feed-forward", "shared experts", "experts", "router", "norms"),
        "optimiser",
    }
    assert held["experts"].elements == count.experts == 1 * 4 * 3 * 32 * 32
    weights = sum(part.elements for name, part in held.items() if name != "optimiser")
    assert weights == count.total + 4  # biases of the router's experts, which no gradient trains
    names = [name for name in contents(run / "checkpoints" / checkpoint_name(6)) if name.startswith("optim.")]
    assert held["optimiser"].tensors == len(names)


def test_info(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "info", str(run)]) == 0
    out = capsys.readouterr().out
    manifest = read_manifest(run / "checkpoints" / checkpoint_name(6))
    for line in (
        f"checkpoint: {run / 'checkpoints' / checkpoint_name(6)}",
        "step: 6",
        f"by: moetrain {manifest.moetrain}, torch {torch.__version__}, 1 ranks, ep = 1",
        "progress: 96 samples, 3,072 tokens",
        f"config hash: {manifest.progress['config_hash']}",
    ):
        assert line in out.splitlines()
    assert "│ experts " in out
    assert "12,288" in out


def test_verify(tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert train(config(folder, data_folder)) == 0
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(folder)]) == 0
    assert [line.split(", ")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"{folder / 'checkpoints' / checkpoint_name(step)}: whole" for step in (6, 4)
    ]
    newest, older = (folder / "checkpoints" / checkpoint_name(step) for step in (6, 4))
    (file,) = newest.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    altered = f"{file}: its SHA-256 is wrong, the file was altered"
    assert main(["checkpoint", "verify", str(folder)]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first == altered
    assert second.startswith(f"{older}: whole")
    (lost,) = older.glob("*.safetensors")
    lost.unlink()
    assert main(["checkpoint", "verify", str(folder)]) == 1
    assert capsys.readouterr().out.splitlines() == [altered, f"{lost}: missing"]
    assert main(["checkpoint", "verify", str(newest)]) == 1
    assert capsys.readouterr().out.splitlines() == [altered]
    assert main(["checkpoint", "verify", str(newest / "nothing")]) == 1
    error = capsys.readouterr().err
    assert "no such folder; give a run, a checkpoints folder or a checkpoint" in error
