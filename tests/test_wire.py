"""Formats of rows between ranks: what they keep of a row, what they cost, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.kernels import Routing
from moetrain.parallel import AllToAllDispatcher, PairDispatcher, create_mesh
from moetrain.parallel.mock import MockWorld
from moetrain.parallel.wire import BLOCK, Wire, pack, unpack

TOKENS, DIM, EXPERTS, TOP_K = 24, 144, 8, 3


@pytest.mark.parametrize("width", [16, 128, 144, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_float8_keeps_three_bits_of_every_block(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    # Blocks and rows of very different sizes: one scale for a row or for the tensor would lose the small ones.
    size_SD = 10.0 ** torch.arange(-6, 6)[:, None] * 10.0 ** (torch.arange(width) // BLOCK * 8 - 8)
    rows_SD = (torch.randn(12, width, generator=generator) * size_SD).to(dtype)
    packed = pack(rows_SD, "float8")
    assert packed.shape == (12, width + 4 * -(-width // BLOCK))
    assert packed.element_size() == 1
    back_SD = unpack(packed, "float8", width, dtype)
    assert back_SD.dtype == dtype
    for there, here in zip(back_SD.split(BLOCK, 1), rows_SD.split(BLOCK, 1), strict=True):
        # Rounding to a fourth significant bit: at most 2⁻⁴ of a value, and 0.026 in the mean square.
        error_S = (there.double() - here.double()).norm(dim=1) / here.double().norm(dim=1)
        assert float(error_S.max()) <= 2**-4
        largest_S, at_S = here.double().abs().max(1)
        torch.testing.assert_close(there.double().abs().gather(1, at_S[:, None])[:, 0], largest_S, rtol=2**-7, atol=0)


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    rows_SD = torch.zeros(4, 256)
    rows_SD[1, 3], rows_SD[2, 200], rows_SD[3, 0] = torch.nan, torch.inf, 1e-30
    back_SD = unpack(pack(rows_SD, "float8"), "float8", 256, torch.float32)
    assert torch.equal(back_SD[0], torch.zeros(256))
    assert back_SD[1, :128].isnan().all()
    assert not back_SD[1, 128:].any()
    assert not back_SD[2, 200].isfinite()
    assert float(back_SD[3, 0]) == pytest.approx(1e-30, rel=1e-6)


def rows_on_the_way(wire: Wire) -> tuple[list[Tensor], int, int]:
    """Rows and gradients after a dispatch and combine through experts that double them; bytes; rows sent."""
    mesh = create_mesh(ep=4, device="cpu")
    generator = torch.Generator().manual_seed(mesh.rank)
    x_TD = torch.randn(TOKENS, DIM, generator=generator).requires_grad_()
    dy_TD = torch.randn(TOKENS, DIM, generator=generator)
    ids_TK = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K).indices
    dispatcher = AllToAllDispatcher(mesh.ep_group, wire)
    dispatched = dispatcher.dispatch(x_TD, Routing.from_topk(ids_TK, torch.ones(TOKENS, TOP_K), EXPERTS))
    indices = dispatcher.bytes_sent
    y_TD = dispatcher.combine(dispatched.x_RD * 2, dispatched)
    assert y_TD.dtype == torch.float32
    y_TD.backward(dy_TD)
    assert x_TD.grad is not None
    assert dispatched.way_back is not None
    rows = dispatched.way_back.rows_sent
    reached_T = (ids_TK // 2).unsqueeze(-1).eq(torch.arange(4)).any(1).sum(1)
    count_T1 = reached_T[:, None].float()
    return (
        [y_TD.detach() / count_T1, 2 * x_TD.detach(), x_TD.grad / count_T1, 2 * dy_TD],
        dispatcher.bytes_sent - indices,
        sum(rows) - rows[mesh.rank],
    )


@pytest.mark.parametrize(("wire", "error"), [("compute", 1e-7), ("bfloat16", 2**-8), ("float8", 2**-4)])
def test_a_format_rounds_rows_and_gradients_on_both_ways(wire: Wire, error: float) -> None:
    """Gradients go out as rows do and come home as sums do."""
    for (y, expected_y, dx, expected_dx), _, _ in MockWorld(4).run(rows_on_the_way, wire):
        for there, here in ((y, expected_y), (dx, expected_dx)):
            distance = float((there - here).norm() / here.norm())
            assert distance <= error
            assert distance > error / 16 or wire == "compute"


def test_a_format_takes_the_bytes_that_it_says() -> None:
    homeward = {"compute": 4 * DIM, "bfloat16": 2 * DIM, "float8": 2 * DIM}
    outward = {"compute": 4 * DIM, "bfloat16": 2 * DIM, "float8": DIM + 4 * 2}
    for wire in homeward:
        results = MockWorld(4).run(rows_on_the_way, wire)
        # After the dispatch: sums home, the gradients of the sums out, the gradients of the rows home. A row that one
        # rank sends another receives.
        expected = sum(rows for _, _, rows in results) * (2 * homeward[wire] + outward[wire])
        assert sum(sent for _, sent, _ in results) == expected


def test_indices_and_weights_travel_as_they_are() -> None:
    def work() -> None:
        mesh = create_mesh(ep=2, device="cpu")
        weights_TK = torch.full((4, 2), 1 / 3, dtype=torch.float32)
        ids_TK = torch.tensor([[0, 3], [1, 2], [3, 1], [2, 0]])
        for kind in (AllToAllDispatcher, PairDispatcher):
            dispatched = kind(mesh.ep_group, "float8").dispatch(
                torch.ones(4, DIM), Routing.from_topk(ids_TK, weights_TK, 4)
            )
            if kind is AllToAllDispatcher:
                assert torch.equal(dispatched.routing.weights_N, torch.full((8,), 1 / 3))
            assert dispatched.routing.counts_E.tolist() == [4, 4]
        dist.barrier()

    MockWorld(2).run(work)
