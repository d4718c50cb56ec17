"""Models in and out of Hugging Face's formats, with transformers as the judge."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_models import KINDS, save
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetrain.checkpoint import CheckpointError, load, read_manifest, verify, write_checkpoint
from moetrain.cli import main
from moetrain.config import from_dict
from moetrain.data import BytesTokenizer
from moetrain.errors import HuggingFaceError
from moetrain.huggingface.companions import tokenizer_of
from moetrain.huggingface.exporting import export_model
from moetrain.huggingface.importing import import_model
from moetrain.huggingface.reader import INDEX, local_folder
from moetrain.model import Decoder
from moetrain.parallel import create_mesh
from moetrain.parallel.mock import MockWorld, RankError

transformers = pytest.importorskip("transformers", reason="needs the extra moetrain[hf]")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def decoder_of(checkpoint: Path, *overrides: str) -> Decoder:
    """The model in a checkpoint, by its own config."""
    config = from_dict(read_manifest(checkpoint).progress["config"], ["train.dtype=float32", *overrides])
    model = Decoder(config).eval()
    load(checkpoint, {f"model.{name}": tensor for name, tensor in model.state_dict().items()})
    return model


def export(path: Path, out: Path, **options: Any) -> Any:
    try:
        return MockWorld(1).run(lambda: export_model(path, out, create_mesh(device="cpu"), **options))[0]
    except RankError as error:
        raise error.__cause__ or error from None


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def settings(model: Any) -> dict[str, Any]:
    """The config of transformers' model but for who wrote it where."""
    return {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version")
    }


TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_import_and_export_keep_every_bit_and_every_logit(kind: str, tmp_path: Path) -> None:
    theirs = save(kind, tmp_path / "theirs", eos_token_id=7, router_aux_loss_coef=0.5)
    model = import_model(str(tmp_path / "theirs"), tmp_path / "ours")
    unset = asdict(from_dict({"model": {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}}))
    wanted = {**KINDS[kind].model, "norm_eps": theirs.config.rms_norm_eps}
    if "rope_scaling" in wanted:
        wanted["rope_scaling"] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **wanted["rope_scaling"]}
    assert asdict(model.config.model) == {**unset["model"], **wanted}
    assert asdict(model.config.router) == {**unset["router"], **KINDS[kind].router}
    assert verify(tmp_path / "ours") == []
    ours = decoder_of(tmp_path / "ours")
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        actual = ours.logits(ours(TOKENS)[0])
    assert float((actual - expected).norm() / expected.norm()) < 2e-5

    assert export(tmp_path / "ours", tmp_path / "back").dropped == []
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "theirs"))
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager"
    )
    assert {name: list(what) for name, what in loading.items() if what} == {}
    assert type(again) is (transformers.LlamaForCausalLM if kind == "mistral" else type(theirs))
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, expected)
    if kind != "mistral":
        assert settings(again) == settings(theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_fused_experts_and_narrow_weights_are_the_same(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    for name, fused in (("classic", False), ("fused", True)):
        save(kind, tmp_path / name, dtype, fused=fused)
        # float16 is no dtype of a run: float32 holds its numbers.
        assert import_model(str(tmp_path / name), tmp_path / f"{name}-ours").dtype == (
            torch.float32 if dtype == torch.float16 else dtype
        )
        export(tmp_path / f"{name}-ours", tmp_path / f"{name}-back", dtype=dtype if dtype == torch.float16 else None)
        assert_same_bits(tensors_of(tmp_path / f"{name}-back"), tensors_of(tmp_path / "classic"))
    assert tensors_of(tmp_path / "fused").keys() != tensors_of(tmp_path / "classic").keys()


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_a_training_step_has_transformers_loss_and_gradients(kind: str, tmp_path: Path) -> None:
    theirs = save(kind, tmp_path / "theirs").train()
    import_model(str(tmp_path / "theirs"), tmp_path / "ours")
    ours = decoder_of(tmp_path / "ours").train()
    targets = TOKENS.roll(-1, 1)
    expected = theirs(TOKENS, labels=TOKENS).loss  # shifts by itself, without the last
    expected.backward()
    targets[:, -1] = -100
    loss = ours.cross_entropy(ours(TOKENS)[0], targets) / (targets != -100).sum()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=2e-6)
    # Through the same way as weights: a checkpoint of ours whose numbers are the gradients.
    manifest = read_manifest(tmp_path / "ours")
    gradients = {
        f"model.{name}": torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for name, tensor in {**dict(ours.named_parameters()), **dict(ours.named_buffers())}.items()
    }
    write_checkpoint(tmp_path / "gradients", gradients, asdict(manifest))
    export(tmp_path / "gradients", tmp_path / "there")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "expected")
    actual = tensors_of(tmp_path / "there")
    for name, gradient in tensors_of(tmp_path / "expected").items():
        # An expert that no token goes to has none.
        assert float((actual[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name


def test_several_ranks_write_the_same_files(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "theirs", torch.bfloat16)
    import_model(str(tmp_path / "theirs"), tmp_path / "ours")
    limit = 20_000
    export(tmp_path / "ours", tmp_path / "one", file_bytes=limit)
    reports = MockWorld(3).run(
        lambda: export_model(tmp_path / "ours", tmp_path / "three", create_mesh(device="cpu"), file_bytes=limit)
    )
    assert len({report.checkpoint for report in reports}) == 1
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sum(name.endswith(".safetensors") for name in files) > 4
    assert files == sorted(path.name for path in (tmp_path / "three").iterdir())
    for name in files:
        one, three = ((tmp_path / folder / name).read_bytes() for folder in ("one", "three"))
        assert one.replace(b"one", b"three") == three if name == "README.md" else one == three
    assert_same_bits(tensors_of(tmp_path / "three"), tensors_of(tmp_path / "theirs"))
    index = json.loads((tmp_path / "one" / INDEX).read_text())
    held = {name: load_file(tmp_path / "one" / name) for name in set(index["weight_map"].values())}
    assert all(key in held[file] for key, file in index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in held.values() for t in tensors.values())
    assert all(sum(t.nbytes for t in tensors.values()) <= limit for tensors in held.values())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "three")
    assert loaded.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2': moetrain knows mixtral, olmoe"),
        ({"sliding_window": 32}, "sliding_window = 32: moetrain's attention sees the whole sequence"),
        ({"hidden_act": "gelu_new"}, "hidden_act = gelu_new: moetrain has silu"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type = yarn: moetrain has default and llama3",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .*: moetrain reads no quantised weights"),
        ({"num_local_experts": None}, "lacks num_local_experts"),
        ({"num_experts_per_tok": 7}, "router.top_k = 7: must be at most model.num_experts = 6"),
        ({"num_hidden_layers": 3}, r"lacks model.layers.2"),
        ({"num_hidden_layers": 1}, r"model.layers.1.*, .* and 22 more: MixtralForCausalLM has no such tensor"),
        ({"hidden_size": 64}, r"model.embed_tokens.weight is \[64, 32\]; by config.json it is \[64, 64\]"),
    ],
)
def test_what_cannot_be_imported(change: dict[str, Any], message: str, tmp_path: Path, mixtral: Path) -> None:
    config = json.loads((mixtral / "config.json").read_text())
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "theirs" / "model.safetensors").symlink_to(mixtral / "model.safetensors")
    with pytest.raises(HuggingFaceError, match=message):
        import_model(str(tmp_path / "theirs"), tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    save("mixtral", folder)
    return folder


def test_damaged_and_missing_files_are_named(tmp_path: Path, mixtral: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name, message in (("config.json", "config.json: missing"), ("model.safetensors", "holds neither model.safet")):
        with pytest.raises(HuggingFaceError, match=message):
            import_model(str(folder), tmp_path / "ours")
        (folder / name).write_bytes((mixtral / name).read_bytes())
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(HuggingFaceError, match=r"model\.safetensors: no whole safetensors file"):
        import_model(str(folder), tmp_path / "ours")
    tensors = load_file(mixtral / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(HuggingFaceError, match=r"lm_head\.weight is F8_E4M3: moetrain reads F64, F32, BF16, F16"):
        import_model(str(folder), tmp_path / "ours")
    (folder / INDEX).write_text('{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(HuggingFaceError, match=r"model-00001-of-00002\.safetensors: missing"):
        import_model(str(folder), tmp_path / "ours")
    with pytest.raises(CheckpointError, match="exists already"):
        import_model(str(folder), folder)


def write_random(folder: Path, model: dict[str, Any], router: dict[str, Any], data: str = "nowhere") -> Path:
    """A checkpoint of a run of this model, as if it had trained."""
    config = from_dict(
        {
            "model": {"vocab_size": 258, "dim": 32, "n_layers": 2, "n_heads": 4, "num_experts": 4, "expert_dim": 24}
            | model,
            "router": router,
            "data": {"path": data, "seq_len": 64},
        }
    )
    decoder = Decoder(config)
    decoder.initialize(0)
    tensors = {f"model.{name}": tensor for name, tensor in decoder.state_dict().items()}
    progress = {"config": json.loads(json.dumps(asdict(config))), "tokens": 12_345, "data": "a fingerprint"}
    write_checkpoint(folder, tensors, {"step": 3, "world_size": 1, "ep": 1, "progress": progress})
    return folder


@pytest.mark.parametrize(
    ("model", "router", "message"),
    [
        ({}, {}, r"nearest is mixtral, but for router.normalize = False \(its weights add up to 1\)"),
        ({"qk_norm": "full"}, {"score": "sigmoid"}, r"nearest is olmoe, but for router.score = sigmoid"),
        (
            {"qk_norm": "head", "shared_dim": 8},
            {},
            r"qwen3_moe, but for model.shared_dim = 8 \(it has no shared expert",
        ),
        ({"shared_dim": 8}, {}, r"qwen2_moe, but for model.shared_gate = False \(its shared expert is gated\)"),
        ({"qk_norm": "full", "dense_layers": [0]}, {}, r"olmoe, but for model.dense_layers = \[0\]"),
        ({"qk_norm": "full", "head_dim": 16}, {}, r"olmoe, but for model.head_dim = 16"),
        ({"qk_norm": "head", "qkv_bias": True}, {}, r"model.qkv_bias = True \(with model.out_bias = False\)"),
        ({"qk_norm": "head"}, {"scale": 2.5}, r"router.scale = 2.5"),
        ({"qk_norm": "head"}, {"force_balance": True}, r"router.force_balance = True"),
    ],
)
def test_what_no_family_has(model: dict[str, Any], router: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_random(tmp_path / "ours", model, router)
    with pytest.raises(HuggingFaceError, match=message):
        export(path, tmp_path / "out", lossy=True)


def test_lossy_export_lists_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = {"bias_update_rate": 0.01, "groups": 2, "rounding": "nearest", "jitter": 0.1}
    path = write_random(tmp_path / "ours", {"qk_norm": "head"}, lost)
    command = ["hf", "export", str(path), "--out", str(tmp_path / "out"), "--dtype", "bf16"]
    assert main(command) == 1
    told = capsys.readouterr().err
    keys = (
        "router.bias_update_rate = 0.01",
        "router.top_groups = 1",
        "router.rounding = nearest",
        "router.jitter = 0.1",
    )
    assert all(key in told for key in keys)
    assert "With --lossy these are left out" in told
    assert [entry.name for entry in tmp_path.iterdir()] == ["ours"]
    assert main([*command, "--lossy"]) == 0
    told = capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"left out: {key}" in told and f"- {key}" in card for key in keys)
    assert "without a tokenizer: the model came with none, or its data are gone" in told
    assert "trained it for 3 steps on 12,345 tokens" in card
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(map(list, loading.values()))
    assert model.dtype == torch.bfloat16
    assert main(command) == 1
    assert "exists already" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- what goes with it


def test_tokenizer_settings_and_licence_come_back(tmp_path: Path, mixtral: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (theirs / name).write_bytes((mixtral / name).read_bytes())
    import_model(str(theirs), tmp_path / "without")
    assert not export(tmp_path / "without", tmp_path / "without-back").has_tokenizer
    files = {
        "tokenizer.json": b'{"a": 1}',
        "tokenizer_config.json": b"{}",
        "tokenizer.model": b"\x00\xff",
        "generation_config.json": b'{"temperature": 0.5}',
        "LICENSE": b"mine",
    }
    for name, content in files.items():
        (theirs / name).write_bytes(content)
    (theirs / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Theirs\n")
    import_model(str(theirs), tmp_path / "ours")
    (tmp_path / "ours" / "generation_config.json").write_bytes(b"{}")
    assert any("generation_config.json" in problem for problem in verify(tmp_path / "ours"))
    (tmp_path / "ours" / "generation_config.json").write_bytes(files["generation_config.json"])
    assert export(tmp_path / "ours", tmp_path / "back").has_tokenizer
    assert {name: (tmp_path / "back" / name).read_bytes() for name in files} == files
    front = (tmp_path / "back" / "README.md").read_text().split("---")[1]
    assert "license: apache-2.0" in front
    assert "base_model" not in front
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_bytes(b"other")
    export(tmp_path / "ours", tmp_path / "with-other", tokenizer=tmp_path / "other")
    assert (tmp_path / "with-other" / "tokenizer.json").read_bytes() == b"other"
    assert not (tmp_path / "with-other" / "tokenizer.model").exists()
    with pytest.raises(HuggingFaceError, match="holds none of tokenizer"):
        export(tmp_path / "ours", tmp_path / "out", tokenizer=mixtral)


def test_bytes_are_a_tokenizer_of_transformers(tmp_path: Path, data_folder: Path) -> None:
    path = write_random(tmp_path / "ours", {"qk_norm": "head"}, {}, str(data_folder))
    assert export(path, tmp_path / "out").has_tokenizer
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Naïve 日本 \U0001f600\t\n  two" + "".join(map(chr, range(256)))
    assert tokenizer(text)["input_ids"] == BytesTokenizer().encode(text).tolist()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == BytesTokenizer.end_of_document
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == BytesTokenizer.end_of_document


def test_what_ends_an_answer_ends_a_text_if_nothing_usual_does(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "theirs", eos_token_id=[2, 3])
    end = {"id": 3, "content": "<|stop|>", "special": True, "normalized": False}
    definition = {
        "version": "1.0",
        "added_tokens": [end | {"single_word": False, "lstrip": False, "rstrip": False}],
        "model": {"type": "WordLevel", "vocab": {"a": 0, "?": 1, "b": 2}, "unk_token": "?"},
    }
    (tmp_path / "theirs" / "tokenizer.json").write_text(json.dumps(definition))
    import_model(str(tmp_path / "theirs"), tmp_path / "ours")
    tokenizer = tokenizer_of(tmp_path / "ours", read_manifest(tmp_path / "ours"))
    assert tokenizer is not None
    assert tokenizer.end_of_document == 3


def test_a_repository_is_downloaded(tmp_path: Path, mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(mixtral)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    import_model("someone/mixtral", tmp_path / "ours")
    assert asked[0][0] == "someone/mixtral"
    assert {"*.safetensors", "config.json", "tokenizer.json"} <= set(asked[0][1])
    assert not any("bin" in pattern for pattern in asked[0][1])
    export(tmp_path / "ours", tmp_path / "out")
    assert "base_model: someone/mixtral" in (tmp_path / "out" / "README.md").read_text()

    def fail(name: str, **options: Any) -> str:
        raise OSError("no network\nhere")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        HuggingFaceError, match=r"someone/else: no such folder, and it cannot be downloaded: no network$"
    ):
        local_folder("someone/else")
    for nonsense in ("nowhere", "/nowhere/else", "a/b/c"):
        with pytest.raises(HuggingFaceError, match="no such folder, and no OWNER/NAME"):
            local_folder(nonsense)


def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    """Of a model of 59 MiB whose largest tensor has 4 MiB."""
    file = tmp_path / "hf.json"
    shape = ["model.n_layers=9", "model.dim=256", "model.expert_dim=512", "router.normalize=true"]
    command = ["bench", "hf", "tiny", *shape, "--dir", str(tmp_path / "bench"), "--json", str(file)]
    assert main(command) == 0
    result = json.loads(file.read_text())
    assert result["bytes"] > 58 * 2**20
    assert result["largest_tensor"] == 4 * 2**20
    assert [row["stage"] for row in result["rows"]] == ["write", "export", "import"]
    for row in result["rows"]:
        assert row["peak_mib"] - row["before_mib"] < 28, row
    assert not (tmp_path / "bench").exists()
    (tmp_path / "bench").mkdir()
    assert main(command) == 2
