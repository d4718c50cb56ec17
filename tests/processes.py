"""Real commands for tests: a run that takes seconds, and waiting for what processes do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

SMALL = [
    "tiny",
    "model.dim=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.num_experts=4",
    "model.expert_dim=32",
    "data.seq_len=32",
    "train.tokens_per_step=512",
    "train.micro_batch=4",
    "optim.warmup_steps=2",
    "checkpoint.every=3",
    "eval.every=0",
    "eval.tokens=512",
    "metrics.every=1",
    "metrics.console=plain",
    "run.device=cpu",
]
"""CONFIG and overrides of `moetrain train`; without data, steps and a run folder."""


def environment() -> dict[str, str]:
    """This process's, without what a launcher may have left in it."""
    left = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in left}
    return {name: value for name, value in kept.items() if not name.startswith("TORCHELASTIC")}


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)
