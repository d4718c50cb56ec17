"""What Triton compiles while it is watched: how many kernels, how long it takes, and how many its cache had."""

from __future__ import annotations

import importlib.util
from typing import Any


class Compilations:
    """Counts the compilations of this process from here to :meth:`stop`; also those of torch.compile that happen in it.

    Costs nothing while nothing is compiled, and counts nothing where triton is not installed.
    """

    def __init__(self) -> None:
        self.compiled = 0
        self.from_cache = 0
        """Kernels that an earlier process had compiled."""
        self.seconds = 0.0
        """Of compiling; loading from the cache is not counted."""
        self._watching = importlib.util.find_spec("triton") is not None
        if self._watching:
            from triton import knobs

            self._before = knobs.compilation.listener
            knobs.compilation.listener = self._listener = self._count

    def stop(self) -> str | None:
        """Stop counting, and say for a log what was counted; None if nothing was, or if it had stopped before."""
        if not self._watching:
            return None
        from triton import knobs

        self._watching = False
        if knobs.compilation.listener is self._listener:  # a later one may still call this one
            knobs.compilation.listener = self._before
        if not self.compiled and not self.from_cache:
            return None
        kernels = "1 kernel" if self.compiled == 1 else f"{self.compiled} kernels"
        return f"compiled {kernels} in {self.seconds:.1f} s, {self.from_cache} from cache"

    def _count(self, *, times: Any, cache_hit: bool, **arguments: Any) -> None:
        """Triton's compilation listener."""
        if self._watching and cache_hit:
            self.from_cache += 1
        elif self._watching:
            self.compiled += 1
            self.seconds += times.total / 1e6
        if self._before is not None:
            self._before(times=times, cache_hit=cache_hit, **arguments)
