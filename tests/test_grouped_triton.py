"""The portable Triton stages against float64, on the GPU or, without one, under Triton's interpreter (conftest.py).

Names: T tokens, D width, E experts, I expert width, H = 2I (gated) or I, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from moetrain.kernels import grouped_triton, tile_schedule
from moetrain.kernels.activation import Activation, activate, activation_gradient, is_gated
from moetrain.kernels.routing import Routing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes with NumPy, which warns of what GPUs do silently.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

# Every output is rounded once, from a float32 sum of exact products: its relative error is the unit roundoff of its
# dtype, and what some hundred roundings of float32 add.
SUMMED = 2e-6
TOLERANCE = {
    torch.float32: SUMMED,
    torch.float16: 2.0**-11 + SUMMED,
    torch.bfloat16: 2.0**-8 + SUMMED,
}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that what a kernel should have written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# Routings ------------------------------------------------------------------------------------------------------------


def topk() -> Routing:
    """2 of 5 experts a token: the first has more than a tile of rows, the fourth none, the last one row."""
    generator = torch.Generator().manual_seed(1)
    ids_TK = torch.stack([torch.zeros(90), torch.randint(1, 3, (90,), generator=generator)], 1).long()
    ids_TK[11, 1] = 4
    return Routing.from_topk(ids_TK.to(DEVICE), torch.rand(90, 2, generator=generator).to(DEVICE), 5)


def single_expert() -> Routing:
    """All rows to one of 5 experts."""
    return Routing.from_topk(torch.full((70, 1), 3, device=DEVICE), torch.rand(70, 1).to(DEVICE), 5)


def variable() -> Routing:
    """0 … 12 of 12 experts a token."""
    chosen_TE = torch.rand(25, 12, generator=torch.Generator().manual_seed(2)) < torch.linspace(0, 1, 25)[:, None]
    token_ids_N, expert_ids_N = (ids.to(DEVICE) for ids in chosen_TE.nonzero(as_tuple=True))
    return Routing.from_pairs(token_ids_N, expert_ids_N, torch.rand(len(token_ids_N), device=DEVICE), 25, 12)


def padded() -> Routing:
    chosen_TE = torch.rand(40, 6, generator=torch.Generator().manual_seed(3)) < 0.4
    return Routing.from_mask(chosen_TE.to(DEVICE), torch.rand(40, 6).to(DEVICE), max_pairs=150)


def no_pairs() -> Routing:
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    return Routing.from_pairs(nothing, nothing, torch.empty(0, device=DEVICE), 6, 3)


ROUTINGS: list[Callable[[], Routing]] = [topk, single_expert, variable, padded, no_pairs]


def balanced(tokens: int, experts: int, k: int) -> Routing:
    """k of the experts, of any popularity between 0 and some times the mean, for each of many tokens on the GPU."""
    logits_TE = torch.randn(tokens, experts, device="cuda") + 0.5 * torch.randn(experts, device="cuda")
    weights_TK, ids_TK = logits_TE.topk(k)
    return Routing.from_topk(ids_TK, weights_TK.softmax(-1), experts)


# The stages, in float64 ----------------------------------------------------------------------------------------------


class Case:
    """Random operands of all stages over a routing, and what each stage should make of them."""

    def __init__(
        self,
        routing: Routing,
        dtype: torch.dtype = torch.float32,
        *,
        width: int = 48,
        inner: int = 80,
        activation: Activation = "swiglu",
        biased: bool = False,
    ):
        self.routing, self.dtype, self.activation = routing, dtype, activation
        generator = torch.Generator(DEVICE).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=DEVICE) * scale).to(dtype)

        hidden = inner * (2 if is_gated(activation) else 1)
        tokens, experts, pairs = routing.num_tokens, routing.num_experts, routing.num_pairs
        self.x_TD, self.dy_TD = normal(tokens, width), normal(tokens, width)
        self.w_up_EHD = normal(experts, hidden, width, scale=width**-0.5)
        self.w_down_EDI = normal(experts, width, inner, scale=inner**-0.5)
        self.b_up_EH = normal(experts, hidden) if biased else None
        self.b_down_ED = normal(experts, width) if biased else None
        self.h_NH, self.dh_NH = normal(pairs, hidden), normal(pairs, hidden)
        self.a_NI, self.y_ND = normal(pairs, inner), normal(pairs, width)
        self.exact = routing.trimmed()
        self.offsets = self.exact.expert_offsets.tolist()

    def check(self, actual: Tensor, expected: Tensor, *, dtype: torch.dtype | None = None) -> None:
        """Only rows of pairs that exist are compared; they must not be NaN."""
        assert actual.dtype == (dtype or self.dtype)
        if actual.shape[0] == self.routing.num_pairs:
            actual = actual[: self.exact.num_pairs]
        assert actual.shape == expected.shape
        assert (actual.double() - expected).norm() <= TOLERANCE[actual.dtype] * expected.norm()

    def check_all(self) -> None:
        for stage in (
            self.check_up_projection,
            self.check_linear,
            self.check_hidden_gradient,
            self.check_weight_gradients,
            self.check_sums,
        ):
            stage()

    def by_expert(self, rows_NK: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """rows · weight[e]ᵀ + bias[e]"""
        return torch.cat(
            [
                rows_NK[first:end].double() @ weight[e].double().t() + (0.0 if bias is None else bias[e].double())
                for e, (first, end) in enumerate(zip(self.offsets, self.offsets[1:], strict=False))
            ]
        )

    def outer_by_expert(self, left_NP: Tensor, right_NQ: Tensor) -> Tensor:
        spans = zip(self.offsets, self.offsets[1:], strict=False)
        return torch.stack([left_NP[i:j].double().t() @ right_NQ[i:j].double() for i, j in spans])

    def check_up_projection(self) -> None:
        h_NH = self.by_expert(self.x_TD[self.exact.token_ids_N], self.w_up_EHD, self.b_up_EH)
        operands = self.x_TD, self.w_up_EHD, self.b_up_EH, self.routing, self.activation
        actual_h_NH, a_NI = grouped_triton.up_projection(*operands, keep_hidden=True)
        assert actual_h_NH is not None
        self.check(actual_h_NH, h_NH)
        self.check(a_NI, activate(h_NH, self.activation))
        no_hidden, same_a_NI = grouped_triton.up_projection(*operands, keep_hidden=False)
        assert no_hidden is None
        torch.testing.assert_close(same_a_NI, a_NI, rtol=0, atol=0, equal_nan=True)

    def check_linear(self) -> None:
        expected_ND = self.by_expert(self.a_NI, self.w_down_EDI, self.b_down_ED)
        actual_ND = grouped_triton.down_projection(self.a_NI, self.w_down_EDI, self.b_down_ED, self.routing)
        self.check(actual_ND, expected_ND)
        expected_ND = self.by_expert(self.dh_NH, self.w_up_EHD.transpose(1, 2))
        self.check(grouped_triton.input_gradient(self.dh_NH, self.w_up_EHD, self.routing), expected_ND)

    def check_hidden_gradient(self) -> None:
        weights_N, h_NH = self.exact.weights_N.double(), self.h_NH[: self.exact.num_pairs].double()
        da_NI = self.by_expert(self.dy_TD[self.exact.token_ids_N], self.w_down_EDI.transpose(1, 2))
        a_NI, dh_NH = activation_gradient(h_NH, da_NI * weights_N[:, None], self.activation)
        actual_dh_NH, weighted_a_NI, dweights_N = grouped_triton.hidden_gradient(
            self.dy_TD, self.w_down_EDI, self.h_NH, self.routing.weights_N, self.routing, self.activation
        )
        self.check(actual_dh_NH, dh_NH)
        self.check(weighted_a_NI, a_NI * weights_N[:, None])
        self.check(dweights_N, (da_NI * a_NI).sum(1), dtype=torch.float32)

    def check_weight_gradients(self) -> None:
        expected_EHD = self.outer_by_expert(self.dh_NH, self.x_TD[self.exact.token_ids_N])
        self.check(grouped_triton.up_weight_gradient(self.dh_NH, self.x_TD, self.routing), expected_EHD)
        expected_EDI = self.outer_by_expert(self.dy_TD[self.exact.token_ids_N], self.a_NI)
        self.check(grouped_triton.down_weight_gradient(self.dy_TD, self.a_NI, self.routing), expected_EDI)

    def check_sums(self) -> None:
        y_ND = self.y_ND[: self.exact.num_pairs].double()
        zeros_TD = torch.zeros(self.routing.num_tokens, y_ND.shape[1], dtype=torch.float64, device=DEVICE)
        for weights_N in (None, self.routing.weights_N):
            weighted_ND = y_ND if weights_N is None else y_ND * self.exact.weights_N.double()[:, None]
            expected_TD = zeros_TD.index_add(0, self.exact.token_ids_N, weighted_ND)
            self.check(grouped_triton.sum_pairs(self.y_ND, weights_N, self.routing), expected_TD)
        expected_EH = torch.stack(
            [self.dh_NH[first:end].double().sum(0) for first, end in zip(self.offsets, self.offsets[1:], strict=False)]
        )
        self.check(grouped_triton.sum_by_expert(self.dh_NH, self.routing), expected_EH, dtype=torch.float32)


@pytest.mark.parametrize("make_routing", ROUTINGS)
def test_every_stage_for_every_kind_of_routing(make_routing: Callable[[], Routing]) -> None:
    Case(make_routing(), biased=True).check_all()


@pytest.mark.parametrize(("width", "inner"), [(16, 16), (64, 128), (208, 48)])
def test_widths_that_tiles_divide_and_do_not_divide(width: int, inner: int) -> None:
    Case(topk(), width=width, inner=inner).check_all()


@pytest.mark.parametrize("activation", get_args(Activation))
def test_activations(activation: Activation) -> None:
    case = Case(topk(), activation=activation, biased=True)
    case.check_up_projection()
    case.check_hidden_gradient()


@pytest.mark.parametrize("make_routing", [topk, padded])
def test_float16(make_routing: Callable[[], Routing]) -> None:
    Case(make_routing(), torch.float16).check_all()


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU its own answer counts")
@pytest.mark.parametrize("make_routing", [topk, padded])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_tensor_descriptors(
    monkeypatch: pytest.MonkeyPatch, make_routing: Callable[[], Routing], activation: Activation
) -> None:
    monkeypatch.setattr(grouped_triton, "_has_tma", lambda device: True)
    Case(make_routing(), torch.float16, activation=activation, biased=True).check_all()


@pytest.mark.parametrize("tma", [False, True])
def test_nan_of_one_expert_stays_there(monkeypatch: pytest.MonkeyPatch, tma: bool) -> None:
    """NaN in the second expert's weights, rows and tokens changes no bit of the others' results."""
    if tma and DEVICE == "cpu":
        monkeypatch.setattr(grouped_triton, "_has_tma", lambda device: True)
    dtype = torch.float16 if tma else torch.float32
    # Every token has one expert, so that tokens can be poisoned with it.
    ids_T1 = torch.arange(60, device=DEVICE)[:, None] * 7 % 60 // 20
    routing = Routing.from_topk(ids_T1, torch.rand(60, 1).to(DEVICE), 3)
    case, poisoned = Case(routing, dtype), Case(routing, dtype)
    first, end = case.offsets[1:3]
    for weight in (poisoned.w_up_EHD, poisoned.w_down_EDI):
        weight[1] = float("nan")
    for rows in (poisoned.h_NH, poisoned.dh_NH, poisoned.a_NI):
        rows[first:end] = float("nan")
    for rows in (poisoned.x_TD, poisoned.dy_TD):
        rows[ids_T1[:, 0] == 1] = float("nan")

    for clean, dirty in zip(run_stages(case), run_stages(poisoned), strict=True):
        by_expert = clean.shape[0] == routing.num_experts
        mine = slice(1, 2) if by_expert else slice(first, end)
        assert dirty[mine].isnan().any()
        clean[mine], dirty[mine] = 0, 0
        assert torch.equal(clean, dirty)


def run_stages(case: Case) -> list[Tensor]:
    """The GEMM stages' outputs, of a row a pair or a matrix an expert."""
    routing, name = case.routing, case.activation
    h_NH, a_NI = grouped_triton.up_projection(case.x_TD, case.w_up_EHD, None, routing, name, keep_hidden=True)
    assert h_NH is not None
    return [
        h_NH,
        a_NI,
        grouped_triton.down_projection(case.a_NI, case.w_down_EDI, None, routing),
        grouped_triton.input_gradient(case.dh_NH, case.w_up_EHD, routing),
        *grouped_triton.hidden_gradient(case.dy_TD, case.w_down_EDI, case.h_NH, routing.weights_N, routing, name),
        grouped_triton.up_weight_gradient(case.dh_NH, case.x_TD, routing),
        grouped_triton.down_weight_gradient(case.dy_TD, case.a_NI, routing),
    ]


@pytest.mark.parametrize("rows_per_tile", [1, 16, 128])
@pytest.mark.parametrize("make_routing", ROUTINGS)
def test_tiles(monkeypatch: pytest.MonkeyPatch, make_routing: Callable[[], Routing], rows_per_tile: int) -> None:
    """The kernel agrees with its twin."""
    monkeypatch.setattr(tile_schedule, "MAX_BLOCK_E", 4)  # so that some experts are counted in several blocks
    routing = make_routing()
    schedule = tile_schedule.tile_schedule(routing, rows_per_tile)
    twin = tile_schedule.tile_schedule_reference(routing, rows_per_tile)
    assert torch.equal(schedule.expert_tiles, twin.expert_tiles)
    tiles = int(schedule.expert_tiles[-1])
    assert tiles <= schedule.max_tiles
    assert torch.equal(schedule.tile_experts_M[:tiles], twin.tile_experts_M[:tiles])


@triton.jit
def _write_items(out, num_items, offsets, experts, expert_tiles, column_tiles, ROWS: tl.constexpr, GROUP: tl.constexpr):
    item = tl.program_id(0)
    expert, first, end, column = tile_schedule.work_item(
        item, num_items, offsets, experts, expert_tiles, column_tiles, ROWS, GROUP
    )
    tl.store(out + 4 * item, expert)
    tl.store(out + 4 * item + 1, first)
    tl.store(out + 4 * item + 2, end)
    tl.store(out + 4 * item + 3, column)


@pytest.mark.parametrize(("rows_per_tile", "group"), [(1, 3), (16, 2), (128, 4), (8, 64)])
@pytest.mark.parametrize("make_routing", ROUTINGS)
def test_work_items(make_routing: Callable[[], Routing], rows_per_tile: int, group: int) -> None:
    """Each row tile meets each column once, an expert's group of row tiles before the next column; looking one round
    ahead reads nothing out of bounds."""
    routing, columns = make_routing(), 3
    schedule = tile_schedule.tile_schedule(routing, rows_per_tile)
    items = int(schedule.expert_tiles[-1]) * columns
    out = torch.empty(items + 2, 4, dtype=torch.int32, device=routing.expert_offsets.device)
    _write_items[(items + 2,)](
        out,
        items,
        routing.expert_offsets,
        schedule.tile_experts_M,
        schedule.expert_tiles,
        columns,
        ROWS=rows_per_tile,
        GROUP=group,
    )
    offsets = routing.expert_offsets.tolist()
    expected = []
    for expert, (start, end) in enumerate(pairwise(offsets)):
        rows = list(range(start, end, rows_per_tile))
        for group_rows in (rows[i : i + group] for i in range(0, len(rows), group)):
            expected += [(expert, row, end, column) for column in range(columns) for row in group_rows]
    assert [tuple(item) for item in out[:items].tolist()] == expected


def test_most_tiles_that_there_can_be() -> None:
    """One row over in every expert but the last, which fills its tile: the bound is off by one."""
    offsets = torch.tensor([0, 9, 18, 26], dtype=torch.int32)
    nothing = torch.empty(26, dtype=torch.int32)
    routing = Routing(nothing, nothing.float(), offsets, nothing, nothing, 26, 3, 1)
    schedule = tile_schedule.tile_schedule_reference(routing, 8)
    assert (int(schedule.expert_tiles[-1]), schedule.max_tiles) == (5, 6)


def test_a_tile_has_rows() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        tile_schedule.tile_schedule(topk(), 0)


# On the GPU ----------------------------------------------------------------------------------------------------------

SHAPES = [
    # tokens, width, inner, experts, k
    (4096, 1024, 512, 32, 4),
    (4001, 1040, 208, 32, 4),
    (300, 512, 256, 64, 2),
    (2048, 96, 32, 8, 2),
]


@pytest.mark.gpu
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int, int, int], dtype: torch.dtype, tma: bool
) -> None:
    if not tma:
        monkeypatch.setattr(grouped_triton, "_has_tma", lambda device: False)
    tokens, width, inner, experts, k = shape
    routing = balanced(tokens, experts, k)
    for activation, biased in (("swiglu", False), ("gelu", True)):
        Case(routing, dtype, width=width, inner=inner, activation=activation, biased=biased).check_all()


@pytest.mark.gpu
def test_same_bits_every_time() -> None:
    case = Case(balanced(4096, 32, 4), torch.bfloat16, width=512, inner=512)
    first = run_stages(case)
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(first, run_stages(case), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("tma", [True, False])
def test_more_than_2_to_the_31_elements(monkeypatch: pytest.MonkeyPatch, tma: bool) -> None:
    """Rows [N, 4096] of bfloat16 with N = 2¹⁹ + 1000, written and read where offsets no longer fit 32 bits."""
    if not tma:
        monkeypatch.setattr(grouped_triton, "_has_tma", lambda device: False)
    tokens, width = 2**19 + 1000, 4096
    routing = Routing.from_topk(torch.arange(tokens, device="cuda")[:, None] % 2, torch.ones(tokens, 1).cuda(), 2)
    a_NI = torch.randn(tokens, 16, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(2, width, 16, device="cuda", dtype=torch.bfloat16)
    y_ND = grouped_triton.down_projection(a_NI, weight, None, routing)
    expected_ND = a_NI[-500:].double() @ weight[1].double().t()
    tolerance = TOLERANCE[torch.bfloat16]
    assert (y_ND[-500:].double() - expected_ND).norm() <= tolerance * expected_ND.norm()
    y_TD = grouped_triton.sum_pairs(y_ND, None, routing)
    assert torch.equal(y_TD[-1], y_ND[routing.pair_ids_N[-1]])
    back_NI = grouped_triton.input_gradient(y_ND, weight, replace(routing))
    expected_NI = y_ND[-500:].double() @ weight[1].double()
    assert (back_NI[-500:].double() - expected_NI).norm() <= tolerance * expected_NI.norm()
    gradient = grouped_triton.up_weight_gradient(y_ND, a_NI, routing)
    first = int(routing.expert_offsets[1])
    expected = y_ND[first:].float().t() @ a_NI[routing.token_ids_N[first:]].float()
    assert (gradient[1].float() - expected).norm() <= 2 * tolerance * expected.norm()
