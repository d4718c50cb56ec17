"""The choice of experts and its weights: the twin against its definition, the kernels against the twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moetrain.kernels.topk import SoftmaxPlace, _TopkSoftmax, topk_softmax, topk_softmax_twin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes with NumPy, which warns of what GPUs do silently.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
PLACES: list[SoftmaxPlace] = ["before", "after"]
# A float32 softmax over E terms: exp's relative error is a few 2^-24 for logits of this size, the sum's no more.
TOLERANCE = 1e-6


def by_definition(logits_TE: Tensor, k: int, before: bool, bias_E: Tensor | None) -> tuple[Tensor, list[list[int]]]:
    """In float64, row by row: sort by (score descending, expert ascending)."""
    logits_TE = logits_TE.double()
    scores_TE = logits_TE
    if bias_E is not None:
        scores_TE = (logits_TE.softmax(-1) if before else logits_TE) + bias_E.double()
    ids = [sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:k] for row in scores_TE.tolist()]
    if before:
        weights = torch.stack([row.softmax(0)[chosen] for row, chosen in zip(logits_TE, ids, strict=True)])
    else:
        weights = torch.stack([row[chosen].softmax(0) for row, chosen in zip(logits_TE, ids, strict=True)])
    return weights, ids


def relative_error(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().cpu().double(), reference.detach().cpu().double()
    return float((value - reference).norm() / reference.norm())


def random_logits(tokens: int, experts: int, *, ties: bool = False) -> Tensor:
    """Ties: multiples of 1/2, so that most rows have equal scores among the winners and at the edge of the choice."""
    logits_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens + experts))
    return (logits_TE * 2).round() / 2 if ties else logits_TE


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("softmax", PLACES)
def test_twin_follows_the_definition(softmax: SoftmaxPlace, biased: bool, ties: bool) -> None:
    logits_TE = random_logits(40, 9, ties=ties)
    bias_E = torch.linspace(-1, 1, 9) if biased else None
    weights_TK, ids_TK = topk_softmax(logits_TE, 3, softmax=softmax, bias_E=bias_E)
    expected_TK, expected_ids = by_definition(logits_TE, 3, softmax == "before", bias_E)
    assert (weights_TK.dtype, ids_TK.dtype) == (torch.float32, torch.int32)
    assert ids_TK.tolist() == expected_ids
    assert relative_error(weights_TK, expected_TK) <= TOLERANCE


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("softmax", PLACES)
def test_gradient_of_the_twin(softmax: SoftmaxPlace, biased: bool) -> None:
    logits_TE = random_logits(5, 7).double().requires_grad_()
    bias_E = torch.linspace(-1, 1, 7, dtype=torch.float64) if biased else None
    assert torch.autograd.gradcheck(lambda x: topk_softmax(x, 3, softmax=softmax, bias_E=bias_E)[0], logits_TE)


CASES = [(5, 6, 2), (67, 60, 8), (3, 257, 32), (9, 128, 1), (33, 8, 8), (2, 1, 1), (1, 4096, 4)]


@pytest.mark.parametrize(("tokens", "experts", "k"), CASES)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("softmax", PLACES)
def test_kernels_equal_the_twin(softmax: SoftmaxPlace, ties: bool, tokens: int, experts: int, k: int) -> None:
    logits_TE = random_logits(tokens, experts, ties=ties).to(DEVICE)
    compare(logits_TE, k, softmax == "before", None)


@pytest.mark.parametrize("softmax", PLACES)
def test_a_bias_moves_the_choice_but_not_the_weights(softmax: SoftmaxPlace) -> None:
    # All below zero, lest columns beyond the experts win.
    logits_TE, bias_E = random_logits(40, 60).to(DEVICE), torch.linspace(-1, -3, 60, device=DEVICE)
    ids_TK = compare(logits_TE, 8, softmax == "before", bias_E)
    assert not torch.equal(ids_TK, compare(logits_TE, 8, softmax == "before", None))


def compare(logits_TE: Tensor, k: int, before: bool, bias_E: Tensor | None) -> Tensor:
    """Kernels against the twin: the same experts, weights and gradients within rounding. Returns the experts."""
    exact = logits_TE.double().requires_grad_()
    expected_TK, expected_ids_TK = topk_softmax_twin(exact, k, before, None if bias_E is None else bias_E.double())
    leaf = logits_TE.clone().requires_grad_()
    weights_TK, ids_TK = _TopkSoftmax.apply(leaf, k, before, bias_E)
    assert (weights_TK.dtype, ids_TK.dtype) == (torch.float32, torch.int32)
    assert torch.equal(ids_TK, expected_ids_TK)
    assert relative_error(weights_TK, expected_TK) <= TOLERANCE

    dweights_TK = random_logits(k, len(logits_TE)).t().to(DEVICE)  # strided
    weights_TK.backward(dweights_TK)
    expected_TK.backward(dweights_TK.double())
    assert leaf.grad is not None
    assert exact.grad is not None
    # A gradient is a difference, with one winner "after" of equal numbers: its rounding is relative to these.
    scale = exact.grad.norm() + (expected_TK.detach() * dweights_TK).norm()
    assert float((leaf.grad - exact.grad).norm()) <= TOLERANCE * float(scale)
    return ids_TK


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("softmax", PLACES)
def test_infinities_nan_and_signed_zeros(softmax: SoftmaxPlace, biased: bool, k: int) -> None:
    inf, nan = float("inf"), float("nan")
    logits_TE = torch.tensor(
        [
            [-inf, 1.0, -inf, 2.0, -inf],
            [-inf, -inf, -inf, -inf, -inf],
            [1.0, nan, 3.0, -nan, 2.0],
            [1.0, inf, 3.0, -inf, inf],
            [-0.0, 0.0, -0.0, 0.0, -1.0],
            [-3e38, 3e38, 1e-45, -1e-45, 0.0],
        ],
        device=DEVICE,
    )
    bias_E = torch.zeros(5, device=DEVICE) if biased else None
    actual = _TopkSoftmax.apply(logits_TE, k, softmax == "before", bias_E)
    expected = topk_softmax_twin(logits_TE, k, softmax == "before", bias_E)
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[0], expected[0], rtol=TOLERANCE, atol=0, equal_nan=True)
    if not biased:
        best = [[3, 1, 0, 2, 4], [0, 1, 2, 3, 4], [1, 3, 2, 4, 0], [1, 4, 2, 0, 3], [0, 1, 2, 3, 4], [1, 2, 4, 3, 0]]
        assert actual[1].tolist() == [row[:k] for row in best]


def test_experts_out_of_reach_get_no_gradient() -> None:
    """−inf among the winners and beside them."""
    logits_TE = torch.tensor([[-float("inf"), 1.0, -float("inf")]], device=DEVICE)
    for before in (True, False):
        leaf = logits_TE.clone().requires_grad_()
        weights_TK, _ = _TopkSoftmax.apply(leaf, 2, before, None)
        weights_TK.backward(torch.ones_like(weights_TK))
        assert weights_TK.tolist() == [[1, 0]]
        assert leaf.grad is not None
        assert leaf.grad.tolist() == [[0, 0, 0]]


def test_strided_logits() -> None:
    logits_TE = random_logits(12, 10).t().to(DEVICE)
    compare(logits_TE, 4, True, None)


@pytest.mark.parametrize(
    ("logits", "k", "softmax", "bias", "message"),
    [
        (torch.zeros(4), 1, "after", None, r"must be \[T, E\]"),
        (torch.zeros(4, 3).bfloat16(), 1, "after", None, "must be float32"),
        (torch.zeros(4, 3), 4, "after", None, r"k must be in \[1, 3\]"),
        (torch.zeros(4, 3), 0, "after", None, r"k must be in \[1, 3\]"),
        (torch.zeros(4, 3), 1, "never", None, "softmax 'never'"),
        (torch.zeros(4, 3), 1, "after", torch.zeros(4), "bias must be"),
        (torch.zeros(4, 3), 1, "after", torch.zeros(3).half(), "bias must be"),
    ],
)
def test_bad_input_is_refused(logits: Tensor, k: int, softmax: SoftmaxPlace, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topk_softmax(logits, k, softmax=softmax, bias_E=bias)


def test_no_tokens() -> None:
    weights_TK, ids_TK = topk_softmax(torch.zeros(0, 4, device=DEVICE), 2, softmax="before")
    assert (weights_TK.shape, ids_TK.shape) == ((0, 2), (0, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("softmax", PLACES)
def test_same_experts_as_torch_topk_where_nothing_ties(softmax: SoftmaxPlace) -> None:
    # A permutation of distinct values in every row.
    order_TE = torch.rand(4096, 128, generator=torch.Generator().manual_seed(0)).argsort(1)
    logits_TE = torch.linspace(-4, 4, 128)[order_TE].cuda()
    weights_TK, ids_TK = topk_softmax(logits_TE, 8, softmax=softmax)
    scores_TE = logits_TE.softmax(-1) if softmax == "before" else logits_TE
    expected = scores_TE.topk(8, dim=-1)
    assert torch.equal(ids_TK.long(), expected.indices)
    expected_TK = expected.values if softmax == "before" else expected.values.softmax(-1)
    assert relative_error(weights_TK, expected_TK) <= TOLERANCE


@pytest.mark.gpu
def test_same_bits_every_time() -> None:
    logits_TE = random_logits(4096, 128, ties=True).cuda().requires_grad_()
    runs = []
    for _ in range(5):
        weights_TK, ids_TK = topk_softmax(logits_TE, 8, softmax="before")
        (dlogits_TE,) = torch.autograd.grad(weights_TK.square().sum(), logits_TE)
        runs.append((weights_TK, ids_TK, dlogits_TE))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))
