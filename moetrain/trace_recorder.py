"""Records which experts sampled tokens go to, from the routers of a model in training.

Shapes: T tokens of this rank, S sampled ones, L MoE layers, E experts, K chosen experts, N pairs, W room for a token's
experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetrain.kernels import Routing
from moetrain.placement.trace import Trace
from moetrain.router import Router, RouterStats


class TraceRecorder:
    """Keeps the experts of tokens of one forward pass; the same tokens in all layers.

    Outside of :meth:`recording` it touches nothing. So neither the passes that activation checkpoints run again in the
    backward pass are recorded, nor anything else but what is asked for.
    """

    def __init__(self, routers: Sequence[Router], layers: Sequence[int], *, tokens: int, seed: int, rank: int):
        """`routers`: of the MoE layers, in order; `layers`: their numbers. `tokens`: to sample, at most all of the
        pass. What is sampled follows from `seed`, step and `rank`, which the trace gives as its tokens' source."""
        self.routers = routers
        self.layers = layers
        self.tokens = tokens
        self.seed = seed
        self.rank = rank
        self._step = 0
        self._sampled_S: Tensor | None = None
        self._ids: list[Tensor] = []

    @contextmanager
    def recording(self, step: int) -> Iterator[None]:
        """Record the forward pass that runs within, as one of this step. Does not wait for the device."""
        self._step, self._sampled_S, self._ids = step, None, []
        hooks = [router.register_forward_hook(self._keep) for router in self.routers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def trace(self) -> Trace:
        """What was recorded last. Copies it to the host, and so waits for the device."""
        ids_SLW = torch.stack(self._ids, 1).cpu().numpy()
        most = max(1, int((ids_SLW >= 0).sum(-1).max()))
        sampled = len(ids_SLW)
        return Trace(
            expert_ids_SLK=ids_SLW[:, :, :most],
            num_experts=self.routers[0].num_experts,
            source_S=np.full(sampled, self.rank),
            step_S=np.full(sampled, self._step),
            layers=tuple(self.layers),
        )

    def _keep(self, router: Router, inputs: Any, output: tuple[Routing, RouterStats]) -> None:
        routing = output[0]
        if self._sampled_S is None:
            rng = np.random.default_rng((self.seed, self._step, self.rank))
            sampled_S = np.sort(rng.permutation(routing.num_tokens)[: self.tokens])
            self._sampled_S = torch.from_numpy(sampled_S).to(routing.token_offsets.device, non_blocking=True)
        room = router.num_experts if router.config.rounding != "none" else router.config.top_k
        self._ids.append(_experts_of(routing, self._sampled_S, room))


@torch.no_grad()
def _experts_of(routing: Routing, tokens_S: Tensor, room: int) -> Tensor:
    """int16 or int32 [S, W]: the experts of some tokens, none of which has more than `room`, and −1 after them."""
    begin_S, end_S = routing.token_offsets[tokens_S], routing.token_offsets[tokens_S + 1]
    walked_SW = begin_S[:, None] + torch.arange(room, dtype=torch.int32, device=tokens_S.device)
    none_SW = walked_SW >= end_S[:, None]
    position_SW = routing.pair_ids_N[walked_SW.clamp_max(routing.num_pairs - 1)]
    ids_SW = torch.searchsorted(routing.expert_offsets[1:-1], position_SW, right=True).masked_fill(none_SW, -1)
    return ids_SW.to(torch.int16 if routing.num_experts < 2**15 else torch.int32)


def recording_name(step: int, rank: int) -> str:
    """File name of a rank's recording: in the order of steps, and of ranks within a step."""
    return f"step-{step:08}-rank-{rank:05}.npz"


def drop_after(folder: Path, step: int) -> None:
    """Remove the recordings of later steps: a run that goes on from here records them again, perhaps on other ranks."""
    for file in folder.glob("step-*-rank-*.npz"):
        if int(file.name.split("-")[1]) > step:
            file.unlink()
