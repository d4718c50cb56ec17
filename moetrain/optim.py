"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from moetrain.config import OptimConfig


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) with decay by name."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        (others if any(word in name for word in config.no_decay) else decayed).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of a step (0-based) out of `total_steps`.

    Linear warm-up to `lr` over `warmup_steps`; then, with progress p from 0 to 1 over the rest and r = min_lr_ratio:
    cosine r + (1 − r)(1 + cos πp)/2, linear r + (1 − r)(1 − p), constant 1, and wsd (warm-up, stable, decay,
    arXiv 2404.06395) 1 until the last `decay_steps`, over which it is linear.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    start = total_steps - config.decay_steps if config.schedule == "wsd" else config.warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    if config.schedule == "constant":
        shape = 1.0
    elif config.schedule == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        shape = 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)
