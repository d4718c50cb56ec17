"""Tensor and sequence parallelism in the mock world, against one rank."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import MODELS, config_of, whole_tensors
from ranks import run_ranks
from torch import Tensor, nn

from moetrain.config import Config, RouterConfig
from moetrain.data import IGNORED, open_dataset
from moetrain.evaluate import Score, heldout_score
from moetrain.model import Decoder, RMSNorm, linear_cross_entropy
from moetrain.parallel import (
    Mesh,
    create_mesh,
    embed,
    gather_rows,
    gather_sequences,
    split_cross_entropy,
    sum_over_ranks,
    sum_to_pieces,
    tensor,
)
from moetrain.parallel.mock import MockWorld
from moetrain.router import Router
from moetrain.state import logical_tensors
from moetrain.trainer import Trainer

# Collectives and what is made of them ---------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_four(x: Tensor, length: int) -> list[Tensor]:
    return [part.unflatten(0, (-1, length)) for part in x.flatten(0, 1).chunk(4)]


Operation = tuple[tuple[int, ...], Callable[[Tensor, Any], Tensor], Callable[[list[Tensor]], list[Tensor]]]
OPERATIONS: dict[str, Operation] = {
    # Shape on each rank, what it does, and what the four together get.
    "gather": ((3, 5), gather_rows, lambda xs: [torch.cat(xs)] * 4),
    "gather halves of sequences": (
        (1, 3, 5),
        lambda x, group: gather_sequences(x, 6, group),
        lambda xs: [torch.cat(xs).view(2, 6, 5)] * 4,
    ),
    "sum to whole sequences": ((8, 3, 5), sum_to_pieces, lambda xs: of_four(torch.stack(xs).sum(0), 3)),
    "sum to halves of sequences": ((2, 6, 5), sum_to_pieces, lambda xs: of_four(torch.stack(xs).sum(0), 3)),
    "sum to odd pieces": ((6, 4, 5), sum_to_pieces, lambda xs: of_four(torch.stack(xs).sum(0), 2)),
    "sum": ((3, 5), sum_over_ranks, lambda xs: [torch.stack(xs).sum(0)] * 4),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_collectives_and_their_gradients_by_their_definitions(name: str) -> None:
    shape, operation, definition = OPERATIONS[name]
    whole = [random(*shape, seed=rank).requires_grad_() for rank in range(4)]
    expected = definition(whole)
    factors = [random(*y.shape, seed=10 + rank) for rank, y in enumerate(expected)]
    sum((y * factor).sum() for y, factor in zip(expected, factors, strict=True)).backward()

    def work() -> tuple[Tensor, Tensor | None]:
        mesh = create_mesh(tp=4, device="cpu")
        x = random(*shape, seed=mesh.rank).requires_grad_()
        y = operation(x, mesh.tp_group)
        (y * factors[mesh.rank]).sum().backward()
        return y.detach(), x.grad

    for (y, gradient), there, leaf in zip(MockWorld(4).run(work), expected, whole, strict=True):
        torch.testing.assert_close(y, there.detach())
        torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_cross_entropy_and_embedding_over_a_split_vocabulary(scale: float) -> None:
    """Scores of 1000 overflow exp; a word of each rank, and several ignored targets."""
    targets_T = torch.tensor([0, IGNORED, 4, 5, 9, 10, IGNORED, 14, 15, 19])
    hidden_TD, weight_VD = scale * random(10, 6), random(20, 6, seed=1)
    leaves = [hidden_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()]
    expected = F.cross_entropy(F.linear(*leaves), targets_T, ignore_index=IGNORED, reduction="sum")
    (expected + (F.embedding(targets_T.clamp_min(0), leaves[1]) * random(10, 6, seed=2)).sum()).backward()

    def work() -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        mesh = create_mesh(tp=4, device="cpu")
        hidden, weight = hidden_TD.clone().requires_grad_(), weight_VD.chunk(4)[mesh.rank].clone().requires_grad_()
        share = split_cross_entropy(F.linear(hidden, weight), targets_T, mesh.tp_group, ignored=IGNORED)
        rows = embed(targets_T.clamp_min(0), weight, mesh.tp_group)
        (share + (rows * random(10, 6, seed=2)).sum()).backward()
        return share.detach(), rows.detach(), hidden.grad, weight.grad

    shares, rows, of_hidden, of_weights = zip(*MockWorld(4).run(work), strict=True)
    torch.testing.assert_close(sum(shares), expected.detach())
    assert torch.equal(sum(rows), F.embedding(targets_T.clamp_min(0), weight_VD))
    torch.testing.assert_close(sum(of_hidden), leaves[0].grad)
    torch.testing.assert_close(torch.cat(of_weights), leaves[1].grad)


def test_norm_over_all_heads() -> None:
    x, weight, factor = random(7, 12), random(12, seed=1), random(7, 12, seed=2)

    def work(tp: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        mesh = create_mesh(tp=tp, device="cpu")
        norm = RMSNorm(12 // tp, 1e-5, torch.float64, group=mesh.tp_group if tp > 1 else None)
        norm.weight = nn.Parameter(weight.chunk(tp)[mesh.rank].clone())
        part = x.chunk(tp, -1)[mesh.rank].clone().requires_grad_()
        y = norm(part)
        (y * factor.chunk(tp, -1)[mesh.rank]).sum().backward()
        return y.detach(), part.grad, norm.weight.grad

    (whole,) = MockWorld(1).run(work, 1)
    for there, parts in zip(whole, zip(*MockWorld(4).run(work, 4), strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts, -1), there)


def test_balance_of_sequences_that_end_between_two_ranks() -> None:
    """Three sequences on two ranks."""
    x_BSD = random(3, 4, 8)

    def work(tp: int) -> tuple[Tensor, Tensor | None]:
        mesh = create_mesh(tp=tp, device="cpu")
        group = mesh.tp_group if tp > 1 else None
        config = RouterConfig(top_k=2, balance_scope="sequence")
        router = Router(8, 6, config, sequence_group=group, param_dtype=torch.float64)
        router.weight = nn.Parameter(random(6, 8, seed=1))
        pieces_BSD = x_BSD if tp == 1 else x_BSD.view(2, 3, 2, 8)[mesh.rank]
        loss = router(pieces_BSD, pieces=tp)[1].balance_loss / tp
        loss.backward()
        return loss.detach(), router.weight.grad

    (whole,) = MockWorld(1).run(work, 1)
    for there, parts in zip(whole, zip(*MockWorld(2).run(work, 2), strict=True), strict=True):
        torch.testing.assert_close(sum(parts), there)


# The decoder ---------------------------------------------------------------------------------------------------------


def pass_through(
    config: Config,
    mesh: Mesh | None,
    device: torch.device | None = None,
    prepare: Callable[[Decoder], None] = lambda model: None,
) -> tuple[Any, ...]:
    """Logits, loss, and the gradients of a parameter that is split and of one that is not, all of this rank."""
    device = mesh.device if device is None and mesh is not None else device
    with torch.device(device or "cpu"):
        model = Decoder(config, mesh)
    model.initialize(0)
    prepare(model)
    tokens_BS = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(1)).to(device)
    hidden_BSD, _ = model(tokens_BS)
    logits = model.logits(hidden_BSD).detach()
    loss = model.cross_entropy(hidden_BSD, tokens_BS.roll(1, 1), chunk_tokens=5)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    chosen = gradients["blocks.0.attention.wo.weight"], gradients["blocks.0.attention_norm.weight"]
    return logits.flatten(0, 1), loss.detach(), *chosen


def pass_through_split(config: Config) -> tuple[Any, ...]:
    return pass_through(config, create_mesh(tp=config.parallel.tp, device="cpu"))


def test_logits_and_a_loss_in_chunks(tmp_path: Path) -> None:
    config = config_of(tmp_path, tmp_path)
    logits, loss, of_wo, of_norm = pass_through(config, None)
    ranks = MockWorld(2).run(pass_through_split, config_of(tmp_path, tmp_path, "parallel.tp=2"))
    all_logits, losses, of_wos, of_norms = zip(*ranks, strict=True)
    torch.testing.assert_close(torch.cat(all_logits), logits)
    torch.testing.assert_close(sum(losses), loss)
    torch.testing.assert_close(torch.cat(of_wos, 1), of_wo)
    torch.testing.assert_close(sum(of_norms), of_norm)


def test_low_precision(tmp_path: Path) -> None:
    """Activations and what travels are bfloat16, the loss is float32, and the numbers are close."""
    settings = ["train.param_dtype=float32", "train.dtype=bfloat16", *MODELS["olmoe"]]
    logits, loss, *_ = pass_through(config_of(tmp_path, tmp_path, *settings), None)
    ranks = MockWorld(2).run(pass_through_split, config_of(tmp_path, tmp_path, *settings, "parallel.tp=2"))
    assert [(there[0].dtype, there[1].dtype) for there in ranks] == [(torch.bfloat16, torch.float32)] * 2
    assert float(sum(there[1] for there in ranks)) == pytest.approx(float(loss), rel=1e-3)
    together = torch.cat([there[0] for there in ranks]).float()
    assert float((together - logits).norm() / logits.float().norm()) < 0.03


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu2)])
def test_real_ranks(tmp_path: Path, device: str) -> None:
    precision = [] if device == "cpu" else ["train.param_dtype=float32", "train.dtype=float32"]
    settings = [*MODELS["olmoe"], *precision, f"run.device={device}", "kernels.experts=reference"]
    run_ranks(2, compare_real_ranks, config_of(tmp_path, tmp_path, *settings, "parallel.tp=2"))


def compare_real_ranks(config: Config) -> None:
    """With one rank, and compiled; threads would share compiled functions, in which a rank's place is a constant."""
    mesh = create_mesh(tp=2, device=config.run.device)
    tolerances = {"rtol": 1e-7, "atol": 1e-7} if mesh.device.type == "cpu" else {"rtol": 1e-4, "atol": 1e-4}
    logits, loss, of_wo, of_norm = pass_through(config, None, mesh.device)
    plain = pass_through(config, mesh)
    whole_loss, whole_of_norm = plain[1].clone(), plain[3].clone()
    for part in (whole_loss, whole_of_norm):
        torch.distributed.all_reduce(part)
    actual = plain[0], whole_loss, plain[2], whole_of_norm
    expected = logits.chunk(2)[mesh.rank], loss, of_wo.chunk(2, 1)[mesh.rank], of_norm
    torch.testing.assert_close(actual, expected, **tolerances)

    if mesh.device.type == "cpu":  # where the usual backend takes long
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    compiled = pass_through(config, mesh, prepare=Decoder.compile_dense_parts)
    torch.testing.assert_close(compiled, plain, **tolerances)


def test_a_compiled_loss_keeps_the_logits_in_their_own_dtype() -> None:
    run_ranks(1, look_at_what_a_compiled_loss_keeps)


def look_at_what_a_compiled_loss_keeps() -> None:
    """As the usual backend divides the graph, of which there must be one, but without generating code."""
    tokens, words = 16, 32
    hidden_TD, weight_VD = (random(rows, 4).float().requires_grad_() for rows in (tokens, words))
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager_decomp_partition")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        compiled(hidden_TD.bfloat16(), weight_VD, torch.arange(tokens), create_mesh(device="cpu").tp_group)
    assert [x.dtype for x in kept if x.numel() >= tokens * words] == [torch.bfloat16]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_layer_gathers_once_and_scatters_once_each_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    calls: Counter[str] = Counter()  # of one rank: the other's are the same

    def counting(name: str, original: Callable[..., None]) -> Callable[..., None]:
        def counted(*arguments: Any, **options: Any) -> None:
            calls[name] += torch.distributed.get_rank() == 0
            original(*arguments, **options)

        return counted

    for name in ("_all_gather", "_reduce_scatter"):
        monkeypatch.setattr(tensor, name, counting(name, getattr(tensor, name)))

    def work() -> None:
        mesh = create_mesh(tp=2, device="cpu")
        model = Decoder(config, mesh)
        model.initialize(0)
        tokens_BS = torch.zeros(2, 16, dtype=torch.int64)
        hidden_BSD, _ = model(tokens_BS)
        model.cross_entropy(hidden_BSD, tokens_BS).backward()

    settings = [f"train.activation_checkpointing.mode={mode}", "parallel.tp=2", "model.first_dense_layers=1"]
    config = config_of(tmp_path, tmp_path, *settings)
    MockWorld(2).run(work)
    layers = 4  # three of attention and one dense: gathered and scattered, forward and, the other way round, backward
    # The embedding scatters; the loss gathers hidden states and its sums. What is recomputed gathers again, and what
    # comes after the last thing that the backward pass needs is not recomputed: the scattering.
    again = {"none": (0, 0), "selective": (3, 0), "full": (4, 3)}[mode]
    assert calls == {"_all_gather": 2 * layers + 1 + 2 + again[0], "_reduce_scatter": 2 * layers + 1 + 1 + again[1]}


# Held-out score ------------------------------------------------------------------------------------------------------


def test_heldout_score_counts_every_target_once(tmp_path: Path, data_folder: Path) -> None:
    def score(config: Config) -> Score:
        mesh = create_mesh(tp=config.parallel.tp, ep=config.parallel.ep, device="cpu")
        model = Decoder(config, mesh)
        model.initialize(0)
        return heldout_score(model, open_dataset(config.data, verify=False), config, mesh)

    settings = ["train.micro_batch=3", "eval.tokens=272"]  # 17 sequences: some of the last batches only fill up
    (alone,) = MockWorld(1).run(score, config_of(tmp_path, data_folder, *settings))
    for there in MockWorld(4).run(score, config_of(tmp_path, data_folder, *settings, "parallel.tp=2", "parallel.ep=4")):
        assert (there.tokens, there.bytes) == (alone.tokens, alone.bytes)
        assert there.loss == pytest.approx(alone.loss, rel=1e-12)


# Checkpoints ---------------------------------------------------------------------------------------------------------


def save(config: Config) -> None:
    """Two steps, and a checkpoint."""
    mesh = create_mesh(tp=config.parallel.tp, ep=config.parallel.ep, device="cpu")
    trainer = Trainer(config, mesh)
    with_loader(trainer, steps=2)
    trainer._save()
    trainer.checkpointer.close()


def resume(config: Config) -> tuple[dict[str, Tensor], Tensor]:
    """What is loaded, whole; and the loss of the next step."""
    mesh = create_mesh(tp=config.parallel.tp, ep=config.parallel.ep, device="cpu")
    trainer = Trainer(config, mesh)
    loaded = whole_tensors(logical_tensors(trainer.model, trainer.engine))
    loss = with_loader(trainer, steps=1)
    torch.distributed.all_reduce(loss)
    trainer.checkpointer.close()
    return loaded, loss


def with_loader(trainer: Trainer, steps: int) -> Tensor:
    """Loss of the last step, this rank's part."""
    losses = []
    accumulate = trainer._accumulate_gradients

    def noting(batches: Any) -> Any:
        loss, routing = accumulate(batches)
        losses.append(loss.clone())
        return loss, routing

    trainer._accumulate_gradients = noting  # type: ignore[method-assign]
    loader = trainer._loader()
    batches = iter(loader)
    for _ in range(steps):
        trainer._step(batches)
        trainer.progress.samples = loader.state_dict()["samples"]
    loader.close()
    return losses[-1]


@pytest.mark.parametrize("saved_as", [(4, 1, 4, False), (4, 2, 2, True)], ids=["ep=4", "tp=2,ep=2,fsdp"])
def test_a_checkpoint_fits_any_topology(
    tmp_path: Path, data_folder: Path, saved_as: tuple[int, int, int, bool]
) -> None:
    """Weights and moments bit for bit, and so the next loss to float64's rounding."""

    def config(name: str, tp: int, ep: int, fsdp: bool, *overrides: str) -> Config:
        topology = [f"parallel.tp={tp}", f"parallel.ep={ep}", f"parallel.fsdp={fsdp}", "train.micro_batch=8"]
        return config_of(tmp_path / name, data_folder, *MODELS["olmoe"], *topology, *overrides)

    ranks, tp, ep, fsdp = saved_as
    MockWorld(ranks).run(save, config("saved", tp, ep, fsdp))
    resumed = f"checkpoint.resume={tmp_path / 'saved' / 'checkpoints' / 'step-00000002'}"
    scope = "router.balance_scope=sequence"
    ((whole, loss),) = MockWorld(1).run(resume, config("one", 1, 1, False, resumed, scope))
    assert float(whole["optim.exp_avg.blocks.0.ffn.w_gate_up"].norm()) > 0
    for ranks, tp, ep, fsdp in [(2, 2, 2, False), (4, 2, 2, True), (8, 4, 8, False)]:
        folder = f"{ranks} {tp} {ep}"
        for loaded, there in MockWorld(ranks).run(resume, config(folder, tp, ep, fsdp, resumed, scope)):
            assert float(there) == pytest.approx(float(loss), rel=1e-12)
            assert loaded.keys() == whole.keys()
            for name, value in loaded.items():
                assert torch.equal(value, whole[name]), name
