"""The k best experts of every token and their weights, from the router's logits.

Shapes: T tokens, E experts, K chosen experts a token.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SoftmaxPlace = Literal["before", "after"]


def topk_softmax(
    logits_TE: Tensor, k: int, *, softmax: SoftmaxPlace, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weights [T, k] in the dtype of the logits and int32 expert ids [T, k], best first.

    softmax "before": weights are the winners' shares of the softmax over all E experts, not renormalised; "after":
    the softmax over the winners' logits only. `logits_TE` is float32 (float64: plain torch everywhere); `bias_E` [E],
    of the same dtype, is added to the probabilities ("before") or the logits ("after") for the choice alone
    (auxiliary-loss-free balancing, arXiv 2408.15664) and gets no gradient. Differentiable once in the logits on a GPU.

    The choice is exact and the same from run to run. Scores are in order of float32 values with −0 = +0 and NaN above
    all, as torch.sort has it; of equal scores the lower expert comes first, where torch.topk promises no order (its
    CPU and CUDA kernels differ). Without a bias both places choose by the logits themselves, whose order softmax keeps
    except that it may round two neighbours to one probability. With a bias "before" compares float32 sums of
    probability and bias; the kernel's probabilities may differ from torch's in the last bits, and with them the choice
    between sums that close. Every id is below E, whatever the logits; a row whose softmax is NaN has NaN weights.

    Refused: packing the expert into the low mantissa bits of its score, as some fused kernels do to find value and
    expert in one reduction. At E = 128 that leaves 16 of 23 bits: scores within a relative 2⁻¹⁶ of each other count as
    equal, and their experts' numbers decide. Such a router is not the one that is evaluated or exported.

    Raises ValueError for other shapes, for k outside [1, E], and for bfloat16 or float16 logits: cast them, preferably
    before the router's product, since rounded logits have many ties.
    """
    if logits_TE.dim() != 2:
        raise ValueError(f"logits must be [T, E], not {list(logits_TE.shape)}")
    if logits_TE.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logits must be float32, not {logits_TE.dtype}: a router's scores need its precision")
    if not 1 <= k <= logits_TE.shape[1]:
        raise ValueError(f"k must be in [1, {logits_TE.shape[1]}], the number of experts, not {k}")
    if softmax not in get_args(SoftmaxPlace):
        raise ValueError(f"softmax {softmax!r}: there are {', '.join(get_args(SoftmaxPlace))}")
    if bias_E is not None:
        if bias_E.shape != logits_TE.shape[1:] or bias_E.dtype != logits_TE.dtype:
            raise ValueError(
                f"bias must be {logits_TE.dtype} [{logits_TE.shape[1]}], not {bias_E.dtype} {list(bias_E.shape)}"
            )
        if bias_E.device != logits_TE.device:
            raise ValueError(f"bias is on {bias_E.device}, logits on {logits_TE.device}")
    if logits_TE.is_cuda and logits_TE.dtype == torch.float32 and importlib.util.find_spec("triton"):
        from moetrain.kernels import topk_triton

        if logits_TE.shape[0] and logits_TE.shape[1] <= topk_triton.MAX_EXPERTS and k <= topk_triton.MAX_K:
            return _TopkSoftmax.apply(logits_TE, k, softmax == "before", bias_E)
    return topk_softmax_twin(logits_TE, k, softmax == "before", bias_E)


def topk_softmax_twin(logits_TE: Tensor, k: int, before: bool, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition, in plain torch."""
    probabilities_TE = logits_TE.softmax(-1) if before else logits_TE
    scores_TE = logits_TE.detach()
    if bias_E is not None:
        scores_TE = probabilities_TE.detach() + bias_E.detach()
    expert_ids_TK = scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights_TK = probabilities_TE.gather(-1, expert_ids_TK)
    return weights_TK if before else weights_TK.softmax(-1), expert_ids_TK.to(torch.int32)


class _TopkSoftmax(torch.autograd.Function):
    """The same by one kernel a direction."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, k: int, before: bool, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        from moetrain.kernels import topk_triton

        logits_TE = logits_TE.contiguous()
        bias_E = None if bias_E is None else bias_E.contiguous()
        weights_TK, expert_ids_TK = topk_triton.topk_softmax_forward(logits_TE, k, before, bias_E)
        ctx.before, ctx.num_experts = before, logits_TE.shape[1]
        ctx.save_for_backward(expert_ids_TK, logits_TE if before else weights_TK)
        ctx.mark_non_differentiable(expert_ids_TK)
        return weights_TK, expert_ids_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        from moetrain.kernels import topk_triton

        expert_ids_TK, saved = ctx.saved_tensors
        dlogits_TE = topk_triton.topk_softmax_backward(
            grads[0].contiguous(), expert_ids_TK, saved, ctx.num_experts, ctx.before
        )
        return dlogits_TE, None, None, None
