"""Five steps of training, and how far their numbers are from those of another run."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moetrain.config import Config, from_dict
from moetrain.data import Batch
from moetrain.parallel import create_mesh
from moetrain.parallel.sharding import ScatteredTensor
from moetrain.state import logical_tensors
from moetrain.trainer import Trainer

STEPS = 5

# One has two MoE layers, query groups and a norm for each head; the other a dense layer and an MoE layer, and what else
# attention and head can have.
MODELS: dict[str, list[str]] = {
    "qwen": ["model.n_layers=2", "model.first_dense_layers=0"],
    "olmoe": [
        "model.n_layers=2",
        "model.n_heads=16",
        "model.n_kv_heads=8",
        "model.head_dim=2",
        "model.qk_norm=full",
        "model.qkv_bias=true",
        "model.out_bias=true",
        "model.tie_embeddings=true",
        "model.shared_gate=true",
        "data.mask_documents=true",
    ],
}


def config_of(folder: Path, data: Path, *overrides: str) -> Config:
    """A little of everything: dense and MoE layers, shared experts, query groups, biased choice, two losses."""
    return from_dict(
        {
            "model": {
                "dim": 16,
                "n_layers": 3,
                "n_heads": 4,
                "n_kv_heads": 2,
                "ffn_dim": 64,
                "num_experts": 8,
                "expert_dim": 16,
                "shared_dim": 16,
                "first_dense_layers": 1,
                "qk_norm": "head",
            },
            "router": {"top_k": 3, "score": "sigmoid", "normalize": True, "bias_update_rate": 0.01},
            "data": {"path": str(data), "seq_len": 16},
            "train": {"steps": STEPS, "tokens_per_step": 512, "param_dtype": "float64", "seed": 3},
            "optim": {"lr": 5e-3, "warmup_steps": 2, "clip_norm": 0.5},
            "checkpoint": {"every": 0, "resume": "never"},
            "eval": {"every": 0, "tokens": 256},
            "metrics": {"every": 1, "console": "none"},
            "run": {"dir": str(folder), "device": "cpu"},
        },
        overrides,
    )


class Numbers(NamedTuple):
    """What a run comes to, as one rank sees it."""

    losses: list[float]
    """Of each step, of the global batch."""
    norms: list[float]
    """Of each step's gradient, before clipping."""
    state: dict[str, Tensor]
    """Weights, router biases and Adam's state at the end, whole and on the CPU, by the names of a checkpoint."""


def train(config: Config, prepare: Callable[[Trainer], None] | None = None, shuffle: int | None = None) -> Numbers:
    """`prepare`: called before the first step. `shuffle`: a seed by which to change the order of the sequences of each
    step, on a single rank."""
    mesh = create_mesh(tp=config.parallel.tp, ep=config.parallel.ep, device=config.run.device)
    trainer = Trainer(config, mesh)
    if prepare is not None:
        prepare(trainer)
    losses: list[float] = []
    norms: list[float] = []
    bytes_sent: list[int] = []
    logged = trainer._report

    def report(loss: Tensor, norm: float, *others: Any) -> None:
        whole = loss.clone()
        dist.all_reduce(whole)
        losses.append(float(whole))
        norms.append(norm)
        bytes_sent.append(trainer.dispatch_bytes)
        logged(loss, norm, *others)

    trainer._report = report  # type: ignore[method-assign]
    loader = trainer._loader()
    try:
        batches = iter(loader) if shuffle is None else shuffled(iter(loader), trainer.accumulation, shuffle)
        for _ in range(STEPS):
            trainer._step(batches)
    finally:
        loader.close()
        trainer.checkpointer.close()
        if trainer.logger is not None:
            trainer.logger.close()
    check_bytes(bytes_sent, trainer)
    return Numbers(losses, norms, whole_tensors(logical_tensors(trainer.model, trainer.engine), mesh.host_group))


def train_all(configs: list[Config], shuffles: list[int | None], folder: Path) -> None:
    """In each process: one run after the other, the numbers of each into a file."""
    # One process group for all of them: DeepSpeed keeps its groups for the life of a process.
    dist.init_process_group = functools.cache(dist.init_process_group)
    torch.set_float32_matmul_precision("highest")  # no TF32
    for place, (config, shuffle) in enumerate(zip(configs, shuffles, strict=True)):
        torch.save(tuple(train(config, shuffle=shuffle)), folder / f"{place}-{dist.get_rank()}.pt")


def shuffled(batches: Iterator[Batch], accumulation: int, seed: int) -> Iterator[Batch]:
    """The sequences of each step, `accumulation` micro-batches, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        step = [next(batches) for _ in range(accumulation)]
        assert step[0].documents_BS is None
        tokens, targets = torch.cat([b.tokens_BS for b in step]), torch.cat([b.targets_BS for b in step])
        for rows in torch.randperm(len(tokens), generator=generator).chunk(accumulation):
            yield Batch(tokens[rows], targets[rows], None)


def whole_tensors(tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Logical tensors put together from the ranks' parts, with this rank's own where others hold the same.

    `group`: of all ranks, if the default one cannot send objects from the CPU.
    """
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {name: placed(tensor) for name, tensor in tensors.items()}, group)
    whole = {}
    for name, tensor in tensors.items():
        whole[name] = torch.full(tensor.shape, math.nan, dtype=tensor.dtype)
        for part in (*parts, parts[dist.get_rank()]):
            for offset, values in part[name]:
                place = tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=True))
                whole[name][place] = values
    return whole


def placed(tensor: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """Where in the logical tensor this rank's parts begin, as a checkpoint sees it, and the parts."""
    if isinstance(tensor, ScatteredTensor):
        return [(tuple(offset), chunk.detach().cpu()) for offset, chunk in tensor.chunks.items()]
    if not isinstance(tensor, DTensor):
        return [((0,) * tensor.ndim, tensor.detach().cpu())]
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor.to_local()
    assert local.shape == shape
    return [(tuple(offset), local.detach().cpu())]


def check_bytes(bytes_sent: list[int], trainer: Trainer) -> None:
    """Steps are counted apart; what is logged is the sum over the ranks."""
    assert sum(bytes_sent) == trainer.model.dispatch_bytes
    total = torch.tensor(bytes_sent)
    dist.all_reduce(total, group=trainer.mesh.host_group)
    records = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    records = [record["moe/dispatch_bytes"] for record in records if "moe/dispatch_bytes" in record]
    if trainer.mesh.rank == 0:
        assert records == (total.tolist() if trainer.mesh.ep > 1 else [])
    dist.barrier(trainer.mesh.host_group)


class Differences(NamedTuple):
    """Largest relative ones: of any step, or of any tensor by its 2-norm; NaN where a number is missing."""

    loss: float
    grad_norm: float
    weights: float
    exp_avg: float
    exp_avg_sq: float

    def within(self, bounds: Differences) -> bool:
        return all(difference <= bound for difference, bound in zip(self, bounds, strict=True))


def assert_same(ranks: list[Numbers], expected: Numbers) -> None:
    """Every rank's numbers, of runs in float64, are the expected ones."""
    found = differences(ranks, expected)
    assert found.within(Differences(*[1e-10] * 5)), found


def largest(several: list[Differences]) -> Differences:
    return Differences(*torch.tensor(several, dtype=torch.float64).amax(0).tolist())  # NaN if any is, unlike max()


def differences(ranks: list[Numbers], expected: Numbers) -> Differences:
    """Of every rank's numbers from the expected ones."""
    return largest([_differences(numbers, expected) for numbers in ranks])


def _differences(numbers: Numbers, expected: Numbers) -> Differences:
    assert numbers.state.keys() == expected.state.keys()
    found: dict[str, list[float]] = {"loss": [], "grad_norm": [], "model": [], "exp_avg": [], "exp_avg_sq": []}
    for there, here in zip(numbers.losses, expected.losses, strict=True):
        found["loss"].append(abs(there - here) / abs(here))
    for there, here in zip(numbers.norms, expected.norms, strict=True):
        found["grad_norm"].append(abs(there - here) / here)
    for name, here in expected.state.items():
        kind = name.removeprefix("optim.").split(".")[0]
        if kind == "step":
            assert torch.equal(numbers.state[name], here), name
        else:
            found[kind].append(_relative(numbers.state[name], here))
    return Differences(*(float(torch.tensor(values, dtype=torch.float64).max()) for values in found.values()))


def _relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    if torch.equal(actual, expected):  # perhaps all zero
        return 0.0
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
