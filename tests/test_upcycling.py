"""Dense models made into mixtures of experts: the same function, until they are trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_models import save
from test_huggingface import TOKENS, decoder_of, export

from moetrain.cli import main
from moetrain.config import load_config
from moetrain.errors import ConfigError, HuggingFaceError
from moetrain.huggingface.upcycling import Recipe, upcycle

transformers = pytest.importorskip("transformers", reason="needs the extra moetrain[hf]")


@pytest.mark.parametrize(
    "recipe",
    [Recipe(4, 1), Recipe(6, 2), Recipe(8, 4, granularity=2), Recipe(12, 3, granularity=3)],
    ids=["copies, top-1", "copies, top-2", "halves", "thirds"],
)
@pytest.mark.parametrize(("dense", "family"), [("llama", "Mixtral"), ("qwen3", "Qwen3Moe")])
def test_the_experts_compute_what_the_dense_model_does(dense: str, family: str, recipe: Recipe, tmp_path: Path) -> None:
    theirs = save(dense, tmp_path / "theirs")
    upcycle(str(tmp_path / "theirs"), tmp_path / "ours", recipe)
    ours = decoder_of(tmp_path / "ours")
    assert (ours.config.model.num_experts, ours.config.router.top_k) == (recipe.experts, recipe.top_k)
    assert ours.config.model.expert_dim == 48 // recipe.granularity
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        hidden, stats = ours(TOKENS)
        actual = ours.logits(hidden)
        loss = float(ours.cross_entropy(hidden, TOKENS.roll(-1, 1))) / TOKENS.numel()
    wanted = float(torch.nn.functional.cross_entropy(expected.flatten(0, 1), TOKENS.roll(-1, 1).flatten()))
    assert loss == pytest.approx(wanted, rel=2e-6)
    assert float((actual - expected).norm() / expected.norm()) < 2e-5
    # The router does choose, and whole copies.
    for layer in stats:
        load_CG = layer.load_E.view(-1, recipe.granularity)
        assert torch.equal(load_CG, load_CG[:, :1].expand_as(load_CG))
        assert int((load_CG[:, 0] > 0).sum()) > 1

    assert export(tmp_path / "ours", tmp_path / "back").family.architecture == f"{family}ForCausalLM"
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(map(list, loading.values()))
    with torch.no_grad():
        assert float((again(TOKENS).logits - expected).norm() / expected.norm()) < 2e-5


def test_noise_makes_copies_differ_by_as_much_as_it_says(tmp_path: Path) -> None:
    save("llama", tmp_path / "theirs", torch.bfloat16)
    recipe = Recipe(4, 2, granularity=2, noise=0.1)
    for name, made in (("plain", Recipe(4, 2, granularity=2)), ("noisy", recipe), ("again", recipe)):
        upcycle(str(tmp_path / "theirs"), tmp_path / name, made)
    plain, noisy, again = (dict(decoder_of(tmp_path / name).named_parameters()) for name in ("plain", "noisy", "again"))
    for name, weights in plain.items():
        assert weights.dtype == torch.bfloat16
        assert torch.equal(noisy[name], again[name])
        if ".experts." not in name:
            assert torch.equal(noisy[name], weights)
            continue
        assert torch.equal(weights[:2], weights[2:])
        assert not torch.equal(noisy[name][:2], noisy[name][2:])
        relative = (noisy[name] - weights).detach().float().std() / weights.detach().float().std()
        assert float(relative) == pytest.approx(0.1, rel=0.1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("qwen3", tmp_path / "theirs")
    command = [
        "hf",
        "upcycle",
        str(tmp_path / "theirs"),
        "--out",
        str(tmp_path / "ours"),
        "--experts",
        "8",
        "--top-k",
        "2",
    ]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "8 experts of Qwen3ForCausalLM" in told
    config = load_config(str(tmp_path / "ours" / "config.yaml"))
    assert (config.model.num_experts, config.model.expert_dim, config.router.normalize) == (8, 48, True)
    for options, message in (
        (["--granularity", "5"], "--experts 8: must be a multiple of --granularity 5"),
        (["--granularity", "4"], "--top-k 2: must be a multiple of --granularity 4"),
        (["--experts", "1"], "--top-k 2: must be at most --experts 1"),
        (["--noise", "-1"], "--noise -1: expected a number from 0 on"),
    ):
        assert main([*command, *options, "--out", str(tmp_path / "other")]) == 2
        assert message in capsys.readouterr().err


def test_what_cannot_be_upcycled(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "theirs")
    with pytest.raises(HuggingFaceError, match="MixtralForCausalLM has experts already; give a dense model"):
        upcycle(str(tmp_path / "theirs"), tmp_path / "ours", Recipe(8, 2))
    save("llama", tmp_path / "dense")
    with pytest.raises(ConfigError, match="--granularity 5: must divide the width of the feed-forward layers, 48"):
        upcycle(str(tmp_path / "dense"), tmp_path / "ours", Recipe(10, 5, granularity=5))
