"""Routing traces: which experts a sample of tokens went to, layer by layer.

Shapes: S sampled tokens, L MoE layers, K chosen experts, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moetrain.errors import TraceError


@dataclass(frozen=True, eq=False)
class Trace:
    """Experts of sampled tokens. Raises TraceError where an expert does not exist."""

    expert_ids_SLK: NDArray[np.integer]
    """No expert: −1, where a token has fewer than K."""
    num_experts: int
    source_S: NDArray[np.integer] | None = None
    """The rank that had the token; None: not recorded."""
    step_S: NDArray[np.integer] | None = None
    """The training step of the token; None: not recorded."""
    layers: tuple[int, ...] | None = None
    """The model's numbers of the MoE layers; None: not recorded."""

    def __post_init__(self) -> None:
        ids = self.expert_ids_SLK
        if ids.ndim != 3 or ids.size == 0:
            raise TraceError(f"expert ids have shape {list(ids.shape)}, not [tokens, layers, experts a token]")
        if ids.max() >= self.num_experts or ids.min() < -1:
            wrong = ids.max() if ids.max() >= self.num_experts else ids.min()
            raise TraceError(f"expert id {wrong} is out of range, 0 to {self.num_experts - 1}")

    @property
    def num_tokens(self) -> int:
        return self.expert_ids_SLK.shape[0]

    @property
    def num_layers(self) -> int:
        return self.expert_ids_SLK.shape[1]

    @property
    def top_k(self) -> int:
        return self.expert_ids_SLK.shape[2]

    def select(self, tokens: NDArray[np.bool_] | slice) -> Trace:
        """The trace of some of the tokens."""
        return replace(
            self,
            expert_ids_SLK=self.expert_ids_SLK[tokens],
            source_S=None if self.source_S is None else self.source_S[tokens],
            step_S=None if self.step_S is None else self.step_S[tokens],
        )
