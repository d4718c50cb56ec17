"""Dispatch and combine over real ranks against the same layer on one rank, in float64."""

from __future__ import annotations

from math import comb

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from moetrain.kernels import Routing, expert_mlp
from moetrain.parallel import AllToAllDispatcher, PairDispatcher, create_mesh
from moetrain.parallel.mock import MockWorld

TOKENS, DIM, INNER, EXPERTS, TOP_K = 10, 8, 6, 8, 3


def test_dispatch_over_four_ranks_equals_one_rank() -> None:
    run_ranks(4, compare_with_one_rank)


def compare_with_one_rank() -> None:
    mesh = create_mesh(ep=4, device="cpu")
    for reachable, padded in ((EXPERTS, False), (4, False), (EXPERTS, True)):
        # With 4 reachable experts those of the upper two ranks get no row at all.
        generator = torch.Generator().manual_seed(reachable)  # the same weights on all ranks
        w_gate_up = torch.randn(EXPERTS, 2 * INNER, DIM, dtype=torch.float64, generator=generator)
        w_down = torch.randn(EXPERTS, DIM, INNER, dtype=torch.float64, generator=generator)
        generator.manual_seed(100 + mesh.rank)  # other tokens on each
        x_TD = torch.randn(TOKENS, DIM, dtype=torch.float64, generator=generator)
        ids_TK = torch.stack([torch.randperm(reachable, generator=generator)[:TOP_K] for _ in range(TOKENS)])
        weights_TK = torch.rand(TOKENS, TOP_K, dtype=torch.float64, generator=generator)

        leaves = [tensor.clone().requires_grad_() for tensor in (x_TD, weights_TK, w_gate_up, w_down)]
        expected = expert_mlp(leaves[0], leaves[2], leaves[3], route(ids_TK, leaves[1], padded))
        expected.square().sum().backward()
        for weight in leaves[2:]:  # all ranks' tokens reach every expert
            assert weight.grad is not None
            dist.all_reduce(weight.grad)

        mine = slice(mesh.rank * 2, mesh.rank * 2 + 2)
        for dispatcher in (AllToAllDispatcher(mesh.ep_group), PairDispatcher(mesh.ep_group)):
            local = [tensor.clone().requires_grad_() for tensor in (x_TD, weights_TK, w_gate_up[mine], w_down[mine])]
            dispatched = dispatcher.dispatch(local[0], route(ids_TK, local[1], padded))
            y_RD = expert_mlp(dispatched.x_RD, local[2], local[3], dispatched.routing)
            y_TD = dispatcher.combine(y_RD, dispatched)
            y_TD.square().sum().backward()

            torch.testing.assert_close(y_TD, expected, rtol=1e-12, atol=0)
            for name, leaf, reference in zip(("x", "weights", "w_gate_up", "w_down"), local, leaves, strict=True):
                assert leaf.grad is not None
                assert reference.grad is not None
                theirs = reference.grad[mine] if name.startswith("w_") else reference.grad
                assert float((leaf.grad - theirs).norm()) <= 1e-13 * float(theirs.norm()), name

            if isinstance(dispatcher, PairDispatcher):
                continue
            assert dispatched.way_back is not None
            rows_sent, rows_received = dispatched.way_back.rows_sent, dispatched.way_back.rows_received
            assert rows_sent == distinct_rows(ids_TK)
            # Rows go out and come back, and so do their gradients; a pair is two int32 and a float64, its gradient
            # another.
            pairs_here = int(((ids_TK // 2) == mesh.rank).sum())
            pairs_out, pairs_in = ids_TK.numel() - pairs_here, dispatched.routing.num_pairs - pairs_here
            rows = sum(rows_sent) - rows_sent[mesh.rank] + sum(rows_received) - rows_received[mesh.rank]
            assert dispatcher.bytes_sent == 2 * rows * DIM * 8 + pairs_out * (2 * 4 + 8) + pairs_in * 8


def route(ids_TK: Tensor, weights_TK: Tensor, padded: bool) -> Routing:
    if not padded:
        return Routing.from_topk(ids_TK, weights_TK, EXPERTS)
    weights_TE = torch.zeros(TOKENS, EXPERTS, dtype=weights_TK.dtype).scatter(1, ids_TK, weights_TK)
    chosen_TE = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, ids_TK, True)
    return Routing.from_mask(chosen_TE, weights_TE, TOKENS * TOP_K + 7)


def distinct_rows(ids_TK: Tensor) -> list[int]:
    """One row for each token and rank that holds one of its experts (two experts a rank)."""
    return [int((ids_TK // 2 == rank).any(1).sum()) for rank in range(4)]


def row_bytes(tokens: int, dim: int, experts: int, top_k: int) -> tuple[float, float, float, float]:
    """Of one rank's rows on their way out, by rows and by pairs: counted, and predicted from the routing."""
    mesh = create_mesh(ep=dist.get_world_size(), device="cpu")
    generator = torch.Generator().manual_seed(mesh.rank)
    ids_TK = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    routing = Routing.from_topk(ids_TK, torch.ones(tokens, top_k), experts)
    x_TD = torch.randn(tokens, dim, generator=generator)
    rows, pairs = AllToAllDispatcher(mesh.ep_group), PairDispatcher(mesh.ep_group)
    y_TD = []
    for dispatcher in (rows, pairs):
        dispatched = dispatcher.dispatch(x_TD, routing)
        received_weights = dispatched.routing.weights_N.new_zeros(dispatched.x_RD.shape[0])
        received_weights.index_add_(0, dispatched.routing.token_ids_N, dispatched.routing.weights_N)
        y_TD.append(dispatcher.combine(dispatched.x_RD * received_weights[:, None], dispatched))
    # The sum of K identical experts is K times the input, whichever way it went.
    for y in y_TD:
        torch.testing.assert_close(y, top_k * x_TD)

    ranks_TK = ids_TK // (experts // mesh.ep)
    elsewhere = [rank for rank in range(mesh.ep) if rank != mesh.rank]
    rows_out = sum(int((ranks_TK == rank).any(1).sum()) for rank in elsewhere)
    pairs_out = int((ranks_TK != mesh.rank).sum())
    return rows.bytes_sent, pairs.bytes_sent, rows_out, pairs_out


@pytest.mark.parametrize("ep", [2, 4, 8])
def test_rows_for_each_rank_against_rows_for_each_pair(ep: int) -> None:
    """At K = 8 of 64 experts, chosen evenly: bytes counted, and those that the choice of experts predicts."""
    tokens, dim, experts, top_k = 512, 64, 64, 8
    results = torch.tensor(MockWorld(ep).run(row_bytes, tokens, dim, experts, top_k))
    by_rows, by_pairs, rows_out, pairs_out = results.sum(0).tolist()
    # Over all ranks, rows that go out come back; a pair takes two int32 and a float32 beside its row, or an int64.
    assert by_rows == 2 * rows_out * dim * 4 + pairs_out * (2 * 4 + 4)
    assert by_pairs == 2 * pairs_out * dim * 4 + pairs_out * 8
    # A token misses a rank if all its K experts are among the other ranks'.
    reached = ep * (1 - comb(experts - experts // ep, top_k) / comb(experts, top_k))
    expected = reached / top_k
    assert rows_out / pairs_out == pytest.approx(expected, rel=0.02)


def test_experts_that_cannot_be_shared_evenly() -> None:
    def dispatch() -> None:
        mesh = create_mesh(ep=2, device="cpu")
        routing = Routing.from_topk(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), 5)
        for dispatcher in (AllToAllDispatcher(mesh.ep_group), PairDispatcher(mesh.ep_group)):
            with pytest.raises(ValueError, match="5 experts cannot be shared evenly by 2 ranks"):
                dispatcher.dispatch(torch.ones(3, 4), routing)

    MockWorld(2).run(dispatch)
