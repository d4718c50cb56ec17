"""How long a step communicates, and how much of that nothing hides: metrics of a run on GPUs.

Events around collectives cannot see what runs beside them. So every `metrics.communication_every` steps a profiler
records the kernels of one step on all ranks, and of these the times; steps in between cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from moetrain.config import Config
from moetrain.metrics import Throughput
from moetrain.parallel import Mesh
from moetrain.timeline import recorded, timeline


class CommunicationMeter:
    """Seconds since the last report. All ranks record the same steps, or one would wait for the others' profilers."""

    def __init__(self, config: Config, mesh: Mesh, throughput: Throughput) -> None:
        on_gpus = mesh.device.type == "cuda" and mesh.world_size > 1
        self._every = config.metrics.communication_every if on_gpus else 0
        self._mesh = mesh
        self._throughput = throughput
        self._seconds: list[tuple[float, float]] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number`, with its update."""
        if self._every == 0 or number % self._every:
            yield
            return
        self._synchronize()  # kernels of the last step are none of this one's
        with self._throughput.paused():
            profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            profiler.start()
        try:
            yield
            self._synchronize()
        finally:
            with self._throughput.paused():
                profiler.stop()
        with self._throughput.paused():
            figures = timeline(recorded(profiler)).figures()
        self._seconds.append((figures["communication_ms"] / 1e3, figures["exposed_ms"] / 1e3))

    def report(self) -> dict[str, float]:
        """Means of the recorded steps and all ranks; nothing if no step was recorded. Collective."""
        if not self._seconds:
            return {}
        mean_2 = torch.tensor(self._seconds, dtype=torch.float64).mean(0) / self._mesh.world_size
        dist.all_reduce(mean_2, group=self._mesh.host_group)
        self._seconds.clear()
        communication, exposed = mean_2.tolist()
        return {
            "time_metrics/communication(s)": communication,
            "time_metrics/exposed_communication(s)": exposed,
        }

    def _synchronize(self) -> None:
        torch.cuda.synchronize(self._mesh.device)
