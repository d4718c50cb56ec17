"""Runs that begin with the weights of a checkpoint, on any topology."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_same, train, whole_tensors
from huggingface_models import save
from torch import Tensor

from moetrain.checkpoint import contents, load
from moetrain.cli import main
from moetrain.config import Config, load_config
from moetrain.errors import CheckpointError, ConfigError
from moetrain.huggingface.importing import import_model
from moetrain.parallel import create_mesh
from moetrain.parallel.mock import MockWorld
from moetrain.state import logical_tensors
from moetrain.trainer import Trainer
from moetrain.trainer import train as run_training

pytest.importorskip("transformers", reason="needs the extra moetrain[hf]")

SETTINGS = [
    "data.seq_len=16",
    "train.steps=5",
    "checkpoint.every=0",
    "train.tokens_per_step=256",
    "train.micro_batch=4",
    "optim.warmup_steps=2",
    "eval.every=0",
    "eval.tokens=256",
    "metrics.every=1",
    "metrics.console=none",
    "run.device=cpu",
]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-MoE in bfloat16, a dense layer and a layer with experts, with words enough for bytes."""
    folder = tmp_path_factory.mktemp("imported")
    save("qwen3_moe", folder / "theirs", torch.bfloat16, vocab_size=260)
    import_model(str(folder / "theirs"), folder / "ours")
    return folder / "ours"


def config_of(imported: Path, folder: Path, data: Path, *overrides: str) -> Config:
    return load_config(str(imported / "config.yaml"), [*SETTINGS, f"run.dir={folder}", f"data.path={data}", *overrides])


def start(config: Config) -> dict[str, Tensor]:
    """The weights that a run begins with, whole."""
    trainer = Trainer(config, create_mesh(tp=config.parallel.tp, ep=config.parallel.ep, device="cpu"))
    trainer.checkpointer.close()
    return whole_tensors(logical_tensors(trainer.model, trainer.engine), trainer.mesh.host_group)


def test_the_same_run_on_every_topology(imported: Path, tmp_path: Path, data_folder: Path) -> None:
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in contents(imported).items()}
    load(imported, tensors)
    wide = ["train.param_dtype=float64", "router.balance_scope=sequence"]
    one = config_of(imported, tmp_path / "one", data_folder, *wide, "train.micro_batch=16")
    found = MockWorld(1).run(start, one)[0]
    assert {name: tensor for name, tensor in found.items() if name.startswith("model.")}.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name
    shutil.rmtree(tmp_path / "one")
    expected = MockWorld(1).run(train, one)[0]
    assert expected.losses[0] > 5.5  # of a model that has not learnt this
    for number, topology in enumerate(
        (["parallel.tp=2", "parallel.ep=2"], ["parallel.fsdp=true", "parallel.ep=2", "train.param_dtype=float64"])
    ):
        config = config_of(imported, tmp_path / str(number), data_folder, *wide, *topology)
        assert_same(MockWorld(4).run(train, config), expected)


def test_a_run_goes_on_from_its_own_checkpoint(
    imported: Path, tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun_with = tmp_path / "begun-with"
    shutil.copytree(imported, begun_with)
    options = [f"checkpoint.init_from={begun_with}", "metrics.console=plain", "model.rope_theta=20000"]
    config = config_of(imported, tmp_path / "run", data_folder, *options, "train.steps=2")
    assert run_training(config) == 0
    told = capsys.readouterr().out
    assert f"begun with the weights of {begun_with}" in told
    assert "changed since then: model.rope_theta = 20000.0 (was 10000.0)" in told
    shutil.rmtree(begun_with)
    assert run_training(config_of(imported, tmp_path / "run", data_folder, *options)) == 0
    told = capsys.readouterr().out
    assert "resumed from" in told
    assert "begun with" not in told
    with pytest.raises(CheckpointError, match=r"checkpoint\.init_from = .*begun-with: no such folder"):
        run_training(config_of(imported, tmp_path / "other", data_folder, *options))


def test_the_data_may_be_in_the_models_own_tokens(
    tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    save("mixtral", theirs, vocab_size=264)
    (theirs / "tokenizer.json").write_text(json.dumps(tokenizer_definition()))
    import_model(str(theirs), ours)
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text("one two two three " * 20)
    assert (
        main(
            [
                "data",
                "build",
                str(tmp_path / "texts"),
                "--tokenizer",
                str(ours),
                "--out",
                str(tmp_path / "data"),
                "--workers",
                "1",
            ]
        )
        == 0
    )
    for name, data, differ in (("own", tmp_path / "data", False), ("others", data_folder, True)):
        config = config_of(ours, tmp_path / name, data, "train.steps=1", "metrics.console=plain")
        assert run_training(config) == 0
        assert ("changed since then: the tokenizer" in capsys.readouterr().out) == differ
    # It speaks with it; a run gives it on.
    assert main(["generate", str(ours), "--prompt", "one two", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("one two")
    assert main(["hf", "export", str(tmp_path / "own"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()


def tokenizer_definition() -> dict[str, Any]:
    words = {"one": 0, "two": 1, "three": 2, "?": 3}
    end = {"id": 4, "content": "<|endoftext|>", "special": True, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [end | {"single_word": False, "lstrip": False, "rstrip": False}],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "?"},
    }


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["model.expert_dim=16"], CheckpointError, r"belongs to another model: it holds model\.blocks\.1\.ffn\.exp"),
        (["model.qkv_bias=true"], CheckpointError, r"belongs to another model: it lacks model\.blocks\.0\.attention"),
        (["checkpoint.resume=somewhere"], ConfigError, r"checkpoint\.init_from = .*: says how a run begins, but check"),
        (
            ["checkpoint.init_from=null", "checkpoint.resume=IMPORTED"],
            CheckpointError,
            r"holds no optimiser's state, so no run can go on from it; begin one with its weights: checkpoint\.init_f",
        ),
    ],
)
def test_what_does_not_begin(
    overrides: list[str], error: type[Exception], message: str, imported: Path, tmp_path: Path, data_folder: Path
) -> None:
    given = [override.replace("IMPORTED", str(imported)) for override in overrides]
    with pytest.raises(error, match=message):
        run_training(config_of(imported, tmp_path / "run", data_folder, *given))
