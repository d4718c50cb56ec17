"""The benchmarks: what they check, measure and write, on sizes that a CPU takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from comparison import config_of
from ranks import run_ranks
from torch import Tensor

from moetrain.benchmarks import microscaling, moe_layer
from moetrain.benchmarks.overlap import communication_removed
from moetrain.benchmarks.peers import (
    PEERS,
    Layer,
    LayerInputs,
    Shape,
    grouped_mm,
    interleave,
    layer_reference,
    relative_error,
    separate,
)
from moetrain.benchmarks.step import part_of
from moetrain.benchmarks.timing import Deadline, saved_bytes, time_interleaved
from moetrain.cli import main
from moetrain.kernels.microscaling import Axis, Format
from moetrain.model import Decoder
from moetrain.parallel import create_mesh, tensor
from moetrain.parallel.mock import MockWorld

CPU = torch.device("cpu")


def run(tmp_path: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    file = tmp_path / "result.json"
    assert main(["bench", *arguments, "--json", str(file)]) == code
    contents: dict[str, Any] = json.loads(file.read_text())
    return contents


def test_moe_layer_writes_checked_times(tmp_path: Path) -> None:
    shape = "96,32,16,4,2"
    result = run(tmp_path, "moe-layer", "--shapes", shape, "--peers", "grouped_mm", "--rounds", "1", "--profile")
    assert result["benchmark"] == "moe-layer"
    assert result["machine"]["versions"]["torch"] == torch.__version__
    layers = {row["name"]: row for row in result["rows"] if "stage" not in row}
    assert list(layers) == ["cuBLAS bound", "moetrain reference", "grouped_mm"]
    for row in layers.values():
        assert (row["shape"], row["status"]) == (shape, "ok")
        assert row["forward_ms"] > 0
        assert row["forward_backward_ms"] > 0
    # h [N, 2I] in bfloat16 is 4NI bytes; without gathered rows and outputs of experts the rest is small change.
    hidden = 4 * 96 * 2 * 16 / 2**20
    assert hidden <= layers["moetrain reference"]["saved_mib"] < 2 * hidden < layers["grouped_mm"]["saved_mib"]
    stages = [row["stage"] for row in result["rows"] if "stage" in row]
    assert len(stages) == len(set(stages)) == 11


def test_a_wrong_layer_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = grouped_mm().forward

    def one_expert_missing(
        x_TD: Tensor, w_router_ED: Tensor, w_gate_up_E2ID: Tensor, w_down_EDI: Tensor, top_k: int
    ) -> Tensor:
        keep_E11 = (torch.arange(len(w_down_EDI)) > 0).to(x_TD.dtype)[:, None, None]
        return right(x_TD, w_router_ED, w_gate_up_E2ID, w_down_EDI * keep_E11, top_k)

    def raises(*tensors: Tensor | int) -> Tensor:
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(PEERS, "wrong", lambda: Layer("wrong", one_expert_missing))
    monkeypatch.setitem(PEERS, "raises", lambda: Layer("raises", raises))
    result = run(
        tmp_path, "moe-layer", "--shapes", "256,32,16,16,2", "--peers", "wrong", "raises", "--rounds", "1", code=1
    )
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["wrong"]["status"] == "WRONG"
    assert "no kernel image" in rows["raises"]["status"]
    assert not any("forward_ms" in rows[name] for name in ("wrong", "raises"))
    assert rows["moetrain reference"]["forward_ms"] > 0


def test_parity_checks_without_timing(tmp_path: Path) -> None:
    result = run(tmp_path, "moe-layer", "--shapes", "64,32,16,4,2", "--peers", "--backends", "torch", "--parity")
    (row,) = result["rows"]
    assert row["name"] == "moetrain torch"
    assert set(row["errors"]) == {"y", "dx", "dw_router", "dw_gate_up", "dw_down"}
    assert "forward_ms" not in row


def test_rounding_beside_top_k(tmp_path: Path) -> None:
    result = run(tmp_path, "moe-layer", "--shapes", "300,32,16,4,2", "--rounding", "nearest", "--rounds", "1")
    top_k, rounded = result["rows"]
    assert (top_k["routing"], top_k["pairs"]) == ("top-k", 600)
    assert rounded["routing"] == "nearest"
    assert rounded["pairs"] % moe_layer.TILE == 0
    assert rounded["speedup"] == pytest.approx(top_k["forward_backward_ms"] / rounded["forward_backward_ms"])


def test_microscaling_checks_results_before_it_times_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = microscaling.fake_quantize

    def ignores_tiles(x_RC: Tensor, fmt: Format, *, axis: Axis = -1, **others: Any) -> tuple[Tensor, Tensor | None]:
        return right(x_RC, fmt, axis=-1 if axis == (-2, -1) else axis, **others)

    monkeypatch.setattr(microscaling, "fake_quantize", ignores_tiles)
    result = run(tmp_path, "microscaling", "--shapes", "64,64", "--peers", "--rounds", "1", code=1)
    rows = {row["name"]: row for row in result["rows"]}
    wrong = rows.pop("nvfp4 16×16 tiles nearest")
    assert wrong["status"] == "WRONG"
    assert "ms" not in wrong
    for row in rows.values():
        assert row["status"] == "ok"
        assert row["of_copy"] == pytest.approx(row["tb_per_s"] / rows["copy"]["tb_per_s"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a small one"),
        (["--shapes", "64"], "two positive numbers"),
        (["--shapes", "64,0"], "two positive numbers"),
        (["--shapes", "64,48"], "multiple of 32"),
        (["--shapes", "64,64", "--peers", "quark"], "there are torchao"),
    ],
)
def test_bad_arguments_of_microscaling_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "microscaling", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give small ones"),
        (["--shapes", "64,32,32,4"], "five positive numbers"),
        (["--shapes", "64,32,32,4,0"], "five positive numbers"),
        (["--shapes", "64,32,32,4,x"], "five positive numbers"),
        (["--shapes", "64,32,32,4,5"], "K = 5"),
        (["--shapes", "64,32,32,4,2", "--peers", "megablocks"], "there are grouped_mm"),
        (["--shapes", "64,32,32,4,2", "--backends", "cutlass"], "cutlass"),
        (["--shapes", "64,32,32,4,2", "--rounding", "sideways"], "sideways"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "moe-layer", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moetrain: error: ")
    assert message in line


def test_a_spent_budget_ends_cleanly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "moe-layer", "--shapes", "64,32,16,4,2", "--budget-seconds", "0"]) == 0
    assert "not measured" in capsys.readouterr().out


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_reference_is_autograd_of_the_definition(top_k: int) -> None:
    inputs = LayerInputs.random(Shape(40, 16, 24, 5, top_k), CPU, torch.float32)
    reference = layer_reference(inputs)
    assert reference.clear_T.any()
    names = ("x_TD", "w_router_ED", "w_gate_up_E2ID", "w_down_EDI")
    x_TD, w_router_ED, w_gate_up_E2ID, w_down_EDI = leaves = [
        getattr(inputs, name).double().requires_grad_() for name in names
    ]
    best_TK, ids_TK = (x_TD @ w_router_ED.t()).topk(top_k)
    gate_TEI, up_TEI = torch.einsum("td,ehd->teh", x_TD, w_gate_up_E2ID).chunk(2, dim=-1)
    y_TED = torch.einsum("tei,edi->ted", F.silu(gate_TEI) * up_TEI, w_down_EDI)
    y_TKD = y_TED.gather(1, ids_TK[:, :, None].expand(-1, -1, x_TD.shape[1]))
    y_TD = (best_TK.softmax(-1)[:, :, None] * y_TKD).sum(1)
    gradients = torch.autograd.grad(y_TD, leaves, reference.dy_TD.double())
    for name, expected in zip(("y_TD", *(f"d{name}" for name in names)), (y_TD.detach(), *gradients), strict=True):
        # float32 against float64: sums of some dozens of terms.
        assert relative_error(getattr(reference, name).double(), expected) < 2e-6, name


def test_reference_marks_tokens_whose_choice_rounding_may_change() -> None:
    inputs = LayerInputs.random(Shape(2000, 32, 16, 32, 4), CPU)
    clear_T = layer_reference(inputs).clear_T
    exact_TK = (inputs.x_TD.float() @ inputs.w_router_ED.float().t()).topk(4).indices.sort().values
    rounded_TK = F.linear(inputs.x_TD, inputs.w_router_ED).topk(4).indices.sort().values
    same_T = (exact_TK == rounded_TK).all(1)
    assert not same_T.all()
    assert same_T[clear_T].all()
    assert clear_T.float().mean() > 0.5


def test_interleaving_gate_and_up() -> None:
    w_gate_up_E2ID = torch.randn(3, 8, 5)
    w_interleaved_E2ID = interleave(w_gate_up_E2ID)
    assert torch.equal(w_interleaved_E2ID[:, 0::2], w_gate_up_E2ID[:, :4])
    assert torch.equal(w_interleaved_E2ID[:, 1::2], w_gate_up_E2ID[:, 4:])
    assert torch.equal(separate(w_interleaved_E2ID), w_gate_up_E2ID)


def test_relative_error_of_nan_is_infinite() -> None:
    assert relative_error(torch.tensor([torch.nan, 1.0]), torch.ones(2)) == float("inf")


def test_saved_bytes_counts_storages_once() -> None:
    x, w = (torch.randn(10, requires_grad=True) for _ in range(2))

    def forward() -> Tensor:
        product = x * w  # saves x and w, which are known
        return product.sigmoid() * product  # saves the sigmoid twice and the product once

    assert saved_bytes(forward, (x, w)) == 2 * 40
    assert saved_bytes(forward, (w,)) == 3 * 40


def test_every_call_is_timed_in_every_round() -> None:
    calls: list[str] = []
    timings = time_interleaved(
        {name: lambda name=name: calls.append(name) for name in "ab"},  # type: ignore[misc]
        CPU,
        rounds=3,
        round_seconds=0.0,
    )
    rounds = "".join(calls)[4:]  # after two warm-up calls each
    assert rounds == "aaabbb" + "bbbaaa" + "aaabbb"
    assert timings["a"].calls == timings["b"].calls == 9
    assert timings["a"].low <= timings["a"].median <= timings["a"].high
    spent = time_interleaved({"a": lambda: None}, CPU, rounds=3, round_seconds=0.0, deadline=Deadline(0))
    assert spent["a"].calls == 3


STEP = [
    *("step", "tiny", "model.dim=32", "model.n_layers=2", "model.n_heads=2", "model.expert_dim=16"),
    *("model.qk_norm=full", "data.seq_len=32", "train.micro_batch=2", "run.device=cpu", "--steps", "2"),
]


def test_step_writes_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, *STEP, "train.tokens_per_step=128", "--warmup", "1")
    (row,) = result["rows"]
    assert (row["name"], row["steps"], row["tokens_per_step"]) == ("moetrain", 2, 128)
    assert row["tokens_per_s"] == pytest.approx(128 / row["step_ms"] * 1e3)
    assert result["data"] == "random tokens"
    assert "random tokens" in capsys.readouterr().out


def test_step_beside_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra moetrain[hf]")
    result = run(tmp_path, *STEP, "--warmup", "1", "--peer", "transformers", "--peer-first")
    assert [row["name"] for row in result["rows"]] == ["transformers", "moetrain"]
    assert all(row["tokens_per_step"] == 64 for row in result["rows"])


@pytest.mark.parametrize("overrides", [(), ("train.activation_checkpointing.mode=full", "parallel.wire=float8")])
def test_step_of_two_ranks_counts_what_it_predicts(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    file = tmp_path / "step.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "moetrain", "bench"]
    command += [*STEP, "model.num_experts=16", "router.top_k=4", "parallel.ep=2", *overrides, "--json", str(file)]
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    result = json.loads(file.read_text())
    (row,) = result["rows"]
    assert result["world_size"] == 2
    assert row["tokens_per_step"] == 2 * 2 * 32
    # Which experts these few tokens choose is not quite even.
    assert row["dispatch_bytes"] == pytest.approx(row["dispatch_bytes_predicted"], rel=0.04)


def test_step_refuses_a_peer_without_such_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="needs the extra moetrain[hf]")
    assert main(["bench", *STEP, "model.shared_dim=16", "--peer", "transformers"]) == 2
    assert "another architecture" in capsys.readouterr().err


OVERLAP = ["overlap", *STEP[1:-2], "--steps", "1", "--rounds", "1"]


def bench_overlap(*arguments: str) -> None:
    assert main(["bench", *OVERLAP, *arguments]) == 0


def test_overlap_off_on_and_floor(tmp_path: Path) -> None:
    file = tmp_path / "overlap.json"
    run_ranks(2, bench_overlap, "parallel.ep=2", "--tokens", "64", "8", "--json", str(file))
    result = json.loads(file.read_text())
    assert "wrong on purpose" in result["floor"]
    assert [(row["tokens"], row["sequences"], row["split"]) for row in result["rows"]] == [
        (64, [2, 32], [1, 1]),
        (8, [2, 4], [1, 1]),
    ]
    for row in result["rows"]:
        assert row["auto"] == "off"
        off, on, floor = (row[way]["passes_ms"] for way in ("off", "on", "floor"))
        assert all(0 < row[way]["passes_ms"] < row[way]["step_ms"] for way in ("off", "on", "floor"))
        assert row["exposed"] == pytest.approx((off - floor) / off)
        assert row.get("hidden", (off - on) / (off - floor)) == pytest.approx((off - on) / (off - floor))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to hide with parallel.tp = 1 and parallel.ep = 1"),
        (["parallel.ep=2", "parallel.fsdp=true"], "not with this parallel.fsdp"),
        (["parallel.ep=2", "--tokens", "65"], "--tokens 65: makes no two halves"),
    ],
)
def test_overlap_says_what_it_needs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["bench", *OVERLAP, *arguments]) == 2
    assert message in capsys.readouterr().err


def gradients_and_collectives() -> tuple[list[Tensor], list[tuple[str, torch.dtype, int]]]:
    """Gradients of a step on a rank, and the collectives of more than single numbers that layers made."""
    mesh = create_mesh(tp=2, ep=2, device="cpu")
    overrides = ["parallel.tp=2", "parallel.ep=2", "train.micro_batch=4"]
    model = Decoder(config_of(Path("run"), Path("data"), *overrides), mesh)
    model.initialize(0)
    tokens_BS = torch.arange(64).view(4, 16)
    _made.calls = []
    hidden_BSD, stats = model.train()(tokens_BS)
    (hidden_BSD.square().sum() + sum(layer.balance_loss for layer in stats)).backward()
    return [weight.grad for weight in model.parameters() if weight.grad is not None], _made.calls


_made = threading.local()


def test_the_floor_makes_no_collective_but_those_that_lead_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(name: str, function: Any) -> Any:
        def call(out: Tensor, x: Tensor, *others: Any, **keywords: Any) -> Any:
            _made.calls.append((name, x.dtype, x.dim()))
            return function(out, x, *others, **keywords)

        return call

    for module, name in ((tensor, "_all_gather"), (tensor, "_reduce_scatter"), (dist, "all_to_all_single")):
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
    real = MockWorld(2).run(gradients_and_collectives)
    with communication_removed():
        floor = MockWorld(2).run(gradients_and_collectives)
    for (gradients, calls), (floor_gradients, floor_calls) in zip(real, floor, strict=True):
        rows = {(name, dtype, dims) for name, dtype, dims in calls if dtype.is_floating_point and dims > 1}
        assert {name for name, *_ in rows} == {"_all_gather", "_reduce_scatter", "all_to_all_single"}
        left = {(name, dtype.is_floating_point, dims) for name, dtype, dims in floor_calls}
        assert left == {("all_to_all_single", False, 2), ("all_to_all_single", True, 1)}
        assert [gradient.shape for gradient in floor_gradients] == [gradient.shape for gradient in gradients]
        assert all(gradient.isfinite().all() for gradient in floor_gradients)
        assert any(relative_error(a, b) > 0.1 for a, b in zip(floor_gradients, gradients, strict=True))
    again = MockWorld(2).run(gradients_and_collectives)
    assert all(torch.equal(a, b) for a, b in zip(again[0][0], real[0][0], strict=True))


def test_parts_of_a_step() -> None:
    assert part_of("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16") == "attention"
    assert part_of("up_projection_kernel") == "expert products"
    assert part_of("_group_chosen_kernel") == "routing"
    assert part_of("void at::native::indexing_backward_kernel<c10::BFloat16>") == "gathers, copies"
    assert part_of("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNT") == "dense products"
    assert part_of("void at::native::vectorized_elementwise_kernel<4>") == "element-wise, reductions"
    assert part_of("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)") == "all-to-all"
    assert part_of("ncclDevKernel_AllReduce_Sum_bf16_RING_LL") == "other collectives"
    assert part_of("exchange_add_rmsnorm_forward_kernel") == "other collectives"
    assert part_of("add_rmsnorm_forward_kernel") == "norms"
    assert part_of("mystery") == "other"


@pytest.mark.gpu
def test_moe_layer_on_a_gpu(tmp_path: Path) -> None:
    shapes = ["2048,256,128,16,4", "1000,272,48,7,2"]
    arguments = ["moe-layer", "--shapes", *shapes, "--peers", "grouped_mm", "--rounds", "1", "--profile"]
    result = run(tmp_path, *arguments)
    assert all(row.get("status", "ok") == "ok" for row in result["rows"])
    assert all(row["ratio"] > 0.5 for row in result["rows"] if "stage" in row)


def test_allreduce_rmsnorm_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "needs several ranks; start it with torchrun --nproc-per-node 2"),
        (["--shapes", "8192"], "--shapes 8192: takes rows,width"),
        (["--shapes", "8192,20000"], "--shapes 8192,20000: takes at least a row, and widths up to 16384"),
    ):
        assert main(["bench", "allreduce-rmsnorm", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_checkpoint_times_saves_of_the_same_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model.dim=32", "model.n_layers=1", "model.expert_dim=16", "data.seq_len=32", "train.tokens_per_step=64"]
    where = ["--folder", str(tmp_path), "--repeats", "1", "--steps", "2"]
    result = run(tmp_path, "checkpoint", "tiny", *small, "train.micro_batch=2", "run.device=cpu", *where)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["moetrain", "torch.save", "DCP save", "DCP async_save", "write and fsync alone"]
    for name, row in rows.items():
        assert row["blocked_s"] > 0, name
        assert row["durable_s"] > 0, name
        assert row["saving_step_s"] > 0, name
    assert rows["torch.save"]["blocked_s"] == pytest.approx(rows["torch.save"]["durable_s"], rel=0.1)
    assert result["bytes_of_rank_0"] > 0
    assert "DCP async_save, pinned: not here (a GPU)" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_checkpoint_has_no_such_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "checkpoint", "tiny", "--methods", "moetrain", "pickle"]) == 2
    assert "--methods pickle: there are moetrain, torch.save, " in capsys.readouterr().err
