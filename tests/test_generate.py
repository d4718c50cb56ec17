"""Text from a model: cached keys and values change no token, nor do batches and ranks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.cli import main
from moetrain.config import from_dict
from moetrain.errors import ConfigError
from moetrain.generate import Generator, Sampling, generation_config, sample
from moetrain.model import Decoder
from moetrain.parallel import create_mesh
from moetrain.parallel.mock import MockWorld
from moetrain.trainer import train

MODEL: dict[str, Any] = {
    "model": {
        "vocab_size": 40,
        "dim": 32,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "num_experts": 8,
        "expert_dim": 16,
        "first_dense_layers": 1,
        "ffn_dim": 48,
        "qk_norm": "head",
        "qkv_bias": True,
        "out_bias": True,
        "shared_dim": 8,
        "init_std": 0.3,
    },
    "router": {"top_k": 2, "score": "sigmoid", "normalize": True, "bias_update_rate": 0.01},
    "train": {"param_dtype": "float64", "dtype": "float32"},
    "run": {"device": "cpu"},
}
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8], [30, 31, 32], [7, 7, 7, 7], [11, 12, 13, 14, 15]]


def decoder(values: dict[str, Any], ranks: int = 1, *overrides: str, slots: Any = None) -> Decoder:
    """The model of a rank; float64, so that no tie of two tokens is decided by rounding."""
    config = generation_config(values, ranks, ["train.dtype=auto", *overrides], "here")
    mesh = None if ranks == 1 else create_mesh(ep=ranks, device="cpu")
    model = Decoder(config, mesh, slots)
    model.initialize(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()))
        for router in model.routers():
            router.bias.copy_(torch.linspace(-0.2, 0.2, router.num_experts))
    return model


def without_cache(model: Decoder, prompt: list[int], tokens: int) -> list[int]:
    """The likeliest tokens, everything computed anew for each."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            hidden, _ = model.eval()(torch.tensor([text]))
            text.append(int(model.logits(hidden[0, -1]).argmax()))
    return text[len(prompt) :]


def test_cached_tokens_are_those_of_whole_passes() -> None:
    model = decoder(MODEL)
    expected = [without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert Generator(model, PROMPTS, Sampling(12, temperature=0)).run() == expected
    assert len({tuple(text) for text in expected}) == len(PROMPTS)


def test_a_text_depends_on_nothing_but_itself_and_the_seed() -> None:
    model = decoder(MODEL)
    texts = Generator(model, PROMPTS, Sampling(12)).run()
    assert Generator(model, PROMPTS[:2], Sampling(12)).run() == texts[:2]
    assert Generator(model, PROMPTS, Sampling(6)).run() == [text[:6] for text in texts]
    assert Generator(model, PROMPTS, Sampling(12, seed=1)).run() != texts
    repeated = Generator(model, [PROMPTS[0]] * 8, Sampling(12)).run()
    assert len({tuple(text) for text in repeated}) > 1


def test_a_text_ends_where_it_is_told_to() -> None:
    model = decoder(MODEL)
    texts = Generator(model, PROMPTS, Sampling(12)).run()
    stop = frozenset([texts[1][4], texts[3][0]])

    def cut(text: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(text) if token in stop]
        return text[: ends[0] + 1] if ends else text

    ended = Generator(model, PROMPTS, Sampling(12), stop).run()
    assert ended == [cut(text) for text in texts]
    assert len({len(text) for text in ended}) > 2
    assert all(token < 20 for text in Generator(model, PROMPTS, Sampling(12), vocabulary=20).run() for token in text)


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([0.5, 3.0, 2.0, -1.0, 1.0])
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000

    def frequencies(**options: Any) -> Tensor:
        return torch.bincount(sample(logits.expand(1000, 5), uniform, Sampling(**options)), minlength=5) / 1000

    def close(found: Tensor, expected: Tensor) -> bool:
        return bool((found - expected).abs().max() <= 1.5e-3)  # 1000 places of equal width

    assert close(frequencies(), logits.softmax(0))
    assert close(frequencies(temperature=0.5), (2 * logits).softmax(0))
    assert frequencies(temperature=0).tolist() == [0, 1, 0, 0, 0]
    two = logits.masked_fill(torch.tensor([True, False, False, True, True]), -torch.inf).softmax(0)
    assert close(frequencies(top_k=2), two)
    # Likeliest first they are 0.6, 0.22, 0.08, …: up to 0.7 it takes two.
    assert close(frequencies(top_p=0.7), two)
    assert frequencies(top_p=0.1).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_p": 0.0}, {"temperature": float("nan")}])
def test_options_that_mean_nothing(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(options)).replace('_', '-')} "):
        Sampling(**options).check()  # type: ignore[arg-type]


def test_ranks_share_experts_and_prompts() -> None:
    expected = Generator(decoder(MODEL), PROMPTS, Sampling(8)).run()
    for ranks in (2, 8):  # of eight, two have no prompt
        found = MockWorld(ranks).run(lambda n: Generator(decoder(MODEL, n), PROMPTS, Sampling(8)).run(), ranks)
        assert found == [expected] * ranks


def test_the_command(tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "model": {"dim": 32, "n_layers": 2, "n_heads": 2, "num_experts": 4, "expert_dim": 32},
        "data": {"path": str(data_folder), "seq_len": 32},
        "train": {"steps": 40, "tokens_per_step": 512, "micro_batch": 8},
        "optim": {"lr": 1e-2, "warmup_steps": 5},
        "checkpoint": {"every": 0},
        "eval": {"every": 0, "tokens": 512},
        "metrics": {"console": "none"},
        "run": {"device": "cpu", "dir": str(tmp_path / "run")},
    }
    assert train(from_dict(values)) == 0
    capsys.readouterr()
    command = ["generate", str(tmp_path / "run"), "--max-tokens", "40", "--json", str(tmp_path / "texts.json")]
    assert main([*command, "--prompt", "12 squared", "--temperature", "0", "--prompt", ""]) == 0
    told = capsys.readouterr().out
    result = json.loads((tmp_path / "texts.json").read_text())
    assert [text["prompt"] for text in result["continuations"]] == ["12 squared", ""]
    for text in result["continuations"]:
        assert text["prompt"] + text["text"] in told
        assert 0 < len(text["tokens"]) <= 40
    assert " squared is " in told.replace("12 squared", "", 1)  # it has learnt that much
    assert main([*command, "--top-p", "2"]) == 2
    assert "--top-p 2: expected a number above 0 and at most 1" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "run"), "parallel.ep=3"]) == 2


def test_a_config_of_many_ranks_serves_one() -> None:
    values = asdict(
        from_dict(MODEL, ["parallel.ep=4", "parallel.tp=2", "placement.trace.every=5", "parallel.wire=float8"])
    )
    config = generation_config(values, 2, [], "here")
    assert (config.parallel.ep, config.parallel.tp, config.parallel.wire) == (2, 1, "compute")
