"""The learning-rate schedules by their formulas, which parameters decay, and the clipping against torch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from moetrain.config import OptimConfig, from_dict
from moetrain.model import Decoder
from moetrain.optim import build_optimizer, learning_rate
from moetrain.parallel import Sharding, clip_gradients, create_mesh, destroy_mesh, gradient_norm


def rates(steps: int, **settings: object) -> list[float]:
    config = OptimConfig(lr=2.0, warmup_steps=4, min_lr_ratio=0.25, **settings)  # type: ignore[arg-type]
    return [learning_rate(step, steps, config) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_after_the_warm_up(schedule: str) -> None:
    shapes = {"cosine": lambda p: (1 + math.cos(math.pi * p)) / 2, "linear": lambda p: 1 - p, "constant": lambda p: 1.0}
    expected = [0.5, 1.0, 1.5, 2.0]
    expected += [2 * (0.25 + 0.75 * shapes[schedule](step / 8)) for step in range(8)]
    assert rates(12, schedule=schedule) == pytest.approx(expected)


def test_wsd_is_stable_and_then_decays() -> None:
    assert rates(12, schedule="wsd", decay_steps=3) == pytest.approx([0.5, 1, 1.5, 2, 2, 2, 2, 2, 2, 2, 1.5, 1])


def test_norms_biases_and_routers_do_not_decay() -> None:
    model = Decoder(from_dict({"model": {"dim": 32, "n_layers": 1, "qk_norm": "head", "qkv_bias": True}}))
    model.initialize(0)
    optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig())
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, others = ({names[p] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {"embedding", "head", "blocks.0.attention.wq.weight", "blocks.0.ffn.experts.w_down"} <= decayed
    assert others == {
        "norm.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.ffn_norm.weight",
        "blocks.0.attention.q_norm.weight",
        "blocks.0.attention.k_norm.weight",
        "blocks.0.attention.wq.bias",
        "blocks.0.attention.wk.bias",
        "blocks.0.attention.wv.bias",
        "blocks.0.ffn.router.weight",
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_that_of_torch(dtype: torch.dtype, max_norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((3, 4), (5,), (2, 3, 2))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    copies = [nn.Parameter(torch.zeros_like(p, dtype=torch.float64)) for p in parameters]
    for copy, parameter in zip(copies, parameters, strict=True):
        assert parameter.grad is not None
        copy.grad = parameter.grad.double().clone()
    mesh = create_mesh(device="cpu")
    shardings = [Sharding(mesh.dense, None), Sharding(mesh.dense, None), Sharding(mesh.experts, 0)]
    norm = gradient_norm(dict(zip(parameters, shardings, strict=True)), mesh.device)
    destroy_mesh()
    clip_gradients(parameters, float(norm), max_norm)
    expected = nn.utils.clip_grad_norm_(copies, max_norm)
    # bfloat16 gradients: the norm is taken in float32, the scaled gradient is rounded once.
    assert float(norm) == pytest.approx(float(expected), rel=1e-12 if dtype == torch.float64 else 1e-6)
    for copy, parameter in zip(copies, parameters, strict=True):
        assert parameter.grad is not None
        assert copy.grad is not None
        error = (parameter.grad.double() - copy.grad).norm() / copy.grad.norm()
        assert float(error) <= (1e-12 if dtype == torch.float64 else 2**-8)
