"""Better places for the experts, looked for while a run goes on, and the move to them where it pays.

Every `placement.rebalance.every` steps rank 0 gives the loads since the last time (or the recorded traffic) to a
search in another process. A fixed number of steps later all ranks take up its answer, waiting for it if need be, so
that the same run moves the same experts at the same step again.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moetrain.config import Config
from moetrain.errors import PlacementError
from moetrain.model import Decoder
from moetrain.parallel import Mesh, on_all_ranks, on_rank_0
from moetrain.parallel.engines import ReplicatedEngine
from moetrain.parallel.migration import ExpertTensor, migrate, migration_bytes, migration_seconds, slots_after
from moetrain.placement.background import Found, Request, Search, recorded_objective
from moetrain.placement.objectives import LoadTerm, Objective
from moetrain.placement.placement import Placement
from moetrain.placement.statistics import load_LG
from moetrain.placement.topology import Topology
from moetrain.placement.topology_file import topology_of

DELAY = 10
"""Steps from the beginning of a search to its answer (at most: until the next search)."""
TIME_LIMIT = 60.0
"""Seconds of a search."""


class Rebalancer:
    """Counts loads, has placements looked for, and moves the experts. Creating one is collective.

    Parameters
    ----------
    model, engine : whose experts move, on more than one ep rank; the model has slots
    step : how many steps are done
    say : shows a line to the user
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        model: Decoder,
        engine: ReplicatedEngine,
        step: int,
        say: Callable[[str], None],
    ):
        self.config = config
        self.settings = config.placement.rebalance
        self.mesh = mesh
        self.model = model
        self.engine = engine
        self.say = say
        self.topology = on_rank_0(self._load_topology, mesh.host_group)
        self._load_LE = torch.zeros(
            len(model.moe_layers), config.model.num_experts, dtype=torch.int64, device=mesh.device
        )
        self._counted_from = step
        """The step after which loads are counted, or recorded: of the last search, or of the start."""
        self._answer_due: int | None = None
        """The step of which the ranks take up the answer of a search; None: no search has begun."""
        self._search: Search | None = None
        """On rank 0, while it runs."""

    def after_step(self, step: int, load_LE: Tensor) -> dict[str, float]:
        """Count this rank's loads [L, E] of a step; begin a search, or take up its answer, where it is time.

        Between the update of a step and whatever else computes with the weights. Collective. Returns metrics of what
        was found: ``placement/gain``, by which fraction the objective falls, and if experts were moved
        ``placement/moved_experts``, ``placement/migration_bytes`` of all ranks and ``placement/migration(s)``.
        """
        every, metrics = self.settings.every, dict[str, float]()
        self._load_LE += load_LE
        if step == self._answer_due:
            metrics = self._take_up(step)
        if step % every == 0:
            self._begin(step)
        return metrics

    def close(self) -> None:
        """End what is running."""
        if self._search is not None:
            self._search.close()
            self._search = None

    def _load_topology(self) -> Topology:
        try:
            return topology_of(self.settings.topology, self.mesh.ep)
        except PlacementError as error:
            raise PlacementError(f"placement.rebalance.topology: {error}") from None

    def _begin(self, step: int) -> None:
        load_LE = self._load_LE.clone()
        self._load_LE.zero_()
        dist.all_reduce(load_LE)
        dist.barrier(self.mesh.host_group)  # all ranks have written what they recorded
        if self.mesh.rank == 0:
            now = Placement(np.array(self.model.expert_ranks), self.mesh.ep)
            # Others wait for rank 0 no longer than run.timeout_minutes.
            seconds = min(TIME_LIMIT, 15 * self.config.run.timeout_minutes)
            try:
                self._search = Search(Request(self._objective(load_LE, step), now, seconds))
            except OSError as error:
                self.say(f"step {step}: no search for a placement: {error}")
        self._counted_from = step
        self._answer_due = step + min(DELAY, self.settings.every)

    def _objective(self, load_LE: Tensor, step: int) -> Callable[[], Objective]:
        if self.settings.objective == "load":
            return partial(LoadTerm, load_LE.double().cpu().numpy())
        name, folder = self.settings.objective, self.config.trace_folder
        return partial(recorded_objective, name, folder, range(self._counted_from + 1, step + 1), self.topology)

    def _take_up(self, step: int) -> dict[str, float]:
        found = on_rank_0(self._answer, self.mesh.host_group)
        if isinstance(found, str):
            self.say(f"step {step}: experts stay where they are: {found}")
            return {}
        if found.gain <= 0:
            self.say(f"step {step}: experts stay where they are: nothing better was found")
            return {"placement/gain": found.gain}
        if found.gain < self.settings.min_gain:
            self.say(
                f"step {step}: experts stay where they are: {self.settings.objective} would fall by {found.gain:.1%}, "
                f"less than placement.rebalance.min_gain = {self.settings.min_gain:.1%}"
            )
            return {"placement/gain": found.gain}
        return {"placement/gain": found.gain, **self._move(step, found)}

    def _answer(self) -> Found | str:
        """What was found, or why nothing was."""
        if self._search is None:
            return "the search did not begin"
        try:
            return self._search.result()
        except (PlacementError, OSError) as error:
            return str(error)
        finally:
            self.close()

    def _move(self, step: int, found: Found) -> dict[str, float]:
        before = self.model.expert_ranks
        gpu_LE = found.solution.placement.gpu_LE
        slots_LE = [
            slots_after(slots.slots, gpu_E, self.mesh.ep)
            for slots, gpu_E in zip(self.model.slots.values(), gpu_LE.tolist(), strict=True)
        ]
        tensors = expert_tensors(self.model, self.engine)
        bytes_LPP = migration_bytes(tensors, slots_LE)
        predicted = migration_seconds(bytes_LPP, self._seconds_per_byte())
        self._synchronize()
        start = time.perf_counter()
        sent = migrate(tensors, slots_LE)
        self._synchronize()
        taken = time.perf_counter() - start
        total = sum(on_all_ranks(lambda: sent, self.mesh.host_group))
        moved = int((np.array(before) != gpu_LE).sum())
        self.say(
            f"step {step}: moved {moved} of {gpu_LE.size} experts, {total / 2**20:,.1f} MiB "
            f"({bytes_LPP.sum() / 2**20:,.1f} predicted) in {taken:.3f} s ({predicted:.3f} predicted); "
            f"{self.settings.objective} falls by {found.gain:.1%}"
        )
        return {
            "placement/moved_experts": moved,
            "placement/migration_bytes": total,
            "placement/migration(s)": taken,
        }

    def _seconds_per_byte(self) -> NDArray[np.float64]:
        """[P, P], of the world: within an ep group as the topology says, and to other groups as its slowest link."""
        groups = self.mesh.world_size // self.mesh.ep
        within_GG = self.topology.seconds_per_byte_GG
        return np.kron(np.eye(groups), within_GG) + np.kron(
            1 - np.eye(groups), np.full_like(within_GG, within_GG.max())
        )

    def _synchronize(self) -> None:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)


def expert_tensors(model: Decoder, engine: ReplicatedEngine) -> list[list[ExpertTensor]]:
    """By MoE layer, what travels with this rank's experts: weights and Adam's moments."""
    return [
        [
            ExpertTensor(rows, engine.shardings[name])
            for name in engine.parameters
            if name.startswith(f"blocks.{layer}.ffn.experts.")
            for rows in engine.held(name)
        ]
        for layer in model.moe_layers
    ]


def rank_load(load_LE: Tensor, expert_ranks: Sequence[Sequence[int]], ep: int) -> float:
    """Load of the fullest ep rank over the mean, 1 if all have the same: Σ_l max_g / Σ_l mean_g of loads [L, E]."""
    loads_LG = load_LG(load_LE.cpu().numpy(), np.array(expert_ranks), ep)
    return float(loads_LG.max(1).sum() / loads_LG.mean(1).sum())
