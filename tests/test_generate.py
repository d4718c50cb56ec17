"""Text from a model: cached keys and values change no token, nor do batches and ranks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from moetrain.cli import main
from moetrain.config import from_dict
from moetrain.errors import ConfigError
from moetrain.generate_command import generation_config
from moetrain.generation import ContextCoherentGenerator, Generator, Sampling, Traffic, sample
from moetrain.kernels import Routing
from moetrain.model import Decoder
from moetrain.parallel import create_mesh
from moetrain.parallel.context_coherent import ContextCoherentExchange
from moetrain.parallel.mock import MockWorld
from moetrain.placement.objectives import objective
from moetrain.placement.placement import Placement
from moetrain.placement.problem import Problem
from moetrain.placement.solve import solve
from moetrain.placement.topology import Topology
from moetrain.placement.trace import Trace
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
    # Two of eight have no prompt.
    found = MockWorld(8).run(lambda: Generator(decoder(MODEL, 8), PROMPTS, Sampling(8)).run())
    assert found == [expected] * 8


ONE_EXPERT = ["router.top_k=1", "router.score=softmax", "router.normalize=false", "router.bias_update_rate=0"]


def speak(
    scheme: type[Generator], values: dict[str, Any], ranks: int, overrides: list[str], slots: Any, **options: Any
) -> tuple[list[list[int]], Traffic]:
    """On each rank: texts, and what all ranks have sent."""
    generator = scheme(decoder(values, ranks, *overrides, slots=slots), PROMPTS, Sampling(8), **options)
    return generator.run(), generator.traffic()


@pytest.mark.parametrize(
    ("overrides", "placed"),
    [(ONE_EXPERT, False), (ONE_EXPERT, True), ([], False), (["router.top_k=3"], True)],
    ids=["top-1", "top-1, placed", "top-2", "top-3, placed"],
)
def test_tokens_that_do_not_go_home_are_the_same(overrides: list[str], placed: bool) -> None:
    slots = [[7, 2, 5, 0, 3, 6, 1, 4], [1, 0, 3, 2, 5, 4, 7, 6]] if placed else None
    free = Generator(decoder(MODEL, 1, *overrides), PROMPTS, Sampling(8)).run()
    stop = frozenset([free[1][2]])  # one ends early
    expected = Generator(decoder(MODEL, 1, *overrides), PROMPTS, Sampling(8), stop).run()
    found = {
        scheme: MockWorld(4).run(lambda scheme=scheme: speak(scheme, MODEL, 4, overrides, slots, stop=stop))
        for scheme in (Generator, ContextCoherentGenerator)
    }
    for ranks in found.values():
        assert [texts for texts, _ in ranks] == [expected] * 4
        assert len({traffic for _, traffic in ranks}) == 1
    home, coherent = (ranks[0][1] for ranks in found.values())
    layers, steps = 2, max(map(len, expected)) - 1
    one = overrides == ONE_EXPERT
    # Of each rank: there and back; there, and for several experts their sums.
    assert home.row_exchanges == 4 * 2 * layers * steps
    assert coherent.row_exchanges == 4 * (1 if one else 2) * layers * steps
    # Sizes before each; here and there ids and weights apart, or in the row; tokens and contexts once a step.
    assert home.exchanges == 4 * 5 * layers * steps
    assert coherent.exchanges == 4 * ((2 if one else 4) * layers + 4) * steps
    assert 0 < coherent.rows < home.rows
    # A key and a value [2 heads, 8] of 8 bytes, and the numbers of layer and sequence, in three layers; a sequence and
    # its token: of each token to three ranks.
    tokens = sum(map(len, expected)) - len(expected)
    assert coherent.context_bytes == 3 * tokens * (3 * (2 * 2 * 8 * 8 + 16) + 16)
    # A row: its numbers, sequence, home and experts, and their weights; sums go with their sequence.
    if one:
        assert coherent.bytes - coherent.context_bytes == coherent.rows * (32 * 8 + 8 + 8 + 8 + 8)
    assert home.context_bytes == 0


def share_uneven(dtype: torch.dtype, rows: list[int]) -> bool:
    """Each rank has so many rows of odd sizes."""
    exchange = ContextCoherentExchange(create_mesh(ep=4, device="cpu").ep_group)
    made = [(torch.full((n, 3), n, dtype=dtype), torch.full((n, 1), n), torch.full((n, 1, 5), -n)) for n in rows]
    found = exchange.share(*made[dist.get_rank()])
    return all(torch.equal(a, torch.cat(b)) for a, b in zip(found, zip(*made, strict=True), strict=True))


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 0, 1, 0]])
def test_rows_of_odd_sizes_arrive(rows: list[int]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert MockWorld(4).run(share_uneven, dtype, rows) == [True] * 4


def test_hops_are_those_that_placements_are_solved_for() -> None:
    """One expert a token: rows are sent where neighbouring layers' experts are on other ranks, and nowhere else."""
    values = {**MODEL, "model": {**MODEL["model"], "n_layers": 4, "first_dense_layers": 0, "shared_dim": 0}}
    model = decoder(values, 1, *ONE_EXPERT)
    chosen: list[Tensor] = []
    for router in model.routers():
        router.register_forward_hook(lambda _, inputs, output: chosen.append(output[0]))
    texts = Generator(model, PROMPTS, Sampling(8)).run()
    # [step and prompts, layer, sequence]: the experts of each sequence's last token.
    routes = torch.stack([expert_of_last(routing) for routing in chosen]).view(-1, 4, len(PROMPTS))[1:]
    ids_SLK = routes.permute(0, 2, 1).reshape(-1, 4, 1).numpy()
    trace = Trace(ids_SLK, 8)
    solved = solve(Problem.equal(objective("hops", trace, Topology.uniform(4)), 4, 8, 4), time_limit=2).placement
    rows = {}
    for name, placement in {"contiguous": Placement.contiguous(4, 8, 4), "solved": solved}.items():
        gpu_LE = torch.from_numpy(placement.gpu_LE)
        where = torch.stack([gpu_LE[layer][routes[:, layer]] for layer in range(4)], 1)  # [steps, layers, sequences]
        inside = int((where[:, 1:] != where[:, :-1]).sum())
        begun = torch.cat([torch.arange(len(PROMPTS))[None] % 4, where[:-1, -1]])  # where the last token has ended
        expected = inside + int((where[:, 0] != begun).sum())
        slots = placement.slots_LE.tolist()
        found, traffic = MockWorld(4).run(speak, ContextCoherentGenerator, values, 4, ONE_EXPERT, slots)[0]
        assert found == texts
        assert traffic.rows == expected
        assert objective("hops", trace, Topology.uniform(4)).cost(placement.gpu_LE) * len(ids_SLK) == pytest.approx(
            inside
        )
        rows[name] = traffic.rows
    assert rows["solved"] < 0.8 * rows["contiguous"]


def expert_of_last(routing: Routing) -> Tensor:
    """Of tokens with one expert, of each sequence's last one: of all if they are as many, else of the prompts'."""
    ends = torch.tensor([len(prompt) for prompt in PROMPTS]).cumsum(0) - 1
    expert_T = routing.expert_ids_N[routing.pair_ids_N]
    return expert_T if len(expert_T) == len(PROMPTS) else expert_T[ends]


def test_the_command(tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "model": {"dim": 32, "n_layers": 2, "n_heads": 2, "num_experts": 4, "expert_dim": 32},
        "data": {"path": str(data_folder), "seq_len": 32},
        "train": {"steps": 45, "tokens_per_step": 512, "micro_batch": 16},
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
    assert result["prompts"] == ["12 squared", ""]
    for prompt, text, tokens in zip(
        result["prompts"], result["texts"], result["runs"]["ordinary"]["continuations"], strict=True
    ):
        assert prompt + text in told
        assert 0 < len(tokens) <= 40
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


# ------------------------------------------------------------------------------------------------------------ GPUs

NARROW = ["train.param_dtype=float32", "train.dtype=float32"]


@pytest.mark.gpu
def test_a_gpu_writes_what_a_cpu_does() -> None:
    torch.set_float32_matmul_precision("highest")  # no TF32
    model = decoder(MODEL, 1, *NARROW)
    expected = Generator(model, PROMPTS, Sampling(12, temperature=0)).run()
    assert Generator(model.to("cuda"), PROMPTS, Sampling(12, temperature=0)).run() == expected


def speak_on_gpus(expected: list[list[int]]) -> None:
    """One prompt for two ranks, so that one has no token at all, and then all of them."""
    torch.set_float32_matmul_precision("highest")
    mesh = create_mesh(ep=2, device="cuda")
    model = decoder(MODEL, 1, *NARROW)  # on the CPU, where the seed makes the same weights
    whole = model.state_dict()
    with torch.device(mesh.device):
        model = Decoder(generation_config(MODEL, 2, NARROW, "here"), mesh)
    for name, tensor in model.state_dict().items():
        tensor.copy_(model.sharding(name).part(whole[name]))
    for scheme in (Generator, ContextCoherentGenerator):
        for number in (1, len(PROMPTS)):
            texts = scheme(model, PROMPTS[:number], Sampling(8, temperature=0)).run()
            assert texts == expected[:number], (scheme, number)


@pytest.mark.gpu2
def test_two_gpus_write_what_a_cpu_does() -> None:
    expected = Generator(decoder(MODEL, 1, *NARROW), PROMPTS, Sampling(8, temperature=0)).run()
    run_ranks(2, speak_on_gpus, expected)
