"""Joining the other ranks of a command, and leaving them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from moetrain.config import Config
from moetrain.errors import ConfigError
from moetrain.parallel import Mesh, create_mesh, destroy_mesh
from moetrain.parallel.environment import meet
from moetrain.parallel.watchdog import GRACE_MINUTES, watched


@contextmanager
def joined_mesh(config: Config) -> Iterator[Mesh]:
    """The process group that the environment describes, left at the end.

    Raises ConfigError if the config does not fit it, or the ranks do not fit one another. In the body, a rank that is
    waited for longer than run.timeout_minutes ends the run; an error that another rank brought about is a PeerError.
    """
    limit = config.run.timeout_minutes
    store = meet(_flat(asdict(config)), config.run.device, limit + GRACE_MINUTES)
    try:
        mesh = create_mesh(
            tp=config.parallel.tp,
            ep=config.parallel.ep,
            device=config.run.device,
            timeout_minutes=limit + GRACE_MINUTES,
            store=store,
        )
    except ValueError as error:
        raise ConfigError(f"run.device = {config.run.device}, parallel.ep = {config.parallel.ep}: {error}") from None
    try:
        with watched(store, mesh, limit * 60):
            yield mesh
    except BaseException:
        # Leaving an NCCL group waits for kernels that wait for the other ranks, who do not know yet: just exit.
        if mesh.device.type == "cpu":
            destroy_mesh()
        raise
    destroy_mesh()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.seed": …} from {"train": {"seed": …}}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
