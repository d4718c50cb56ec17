"""Joining the other ranks of a command, and leaving them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moetrain.config import Config
from moetrain.errors import ConfigError
from moetrain.parallel import Mesh, create_mesh, destroy_mesh


@contextmanager
def joined_mesh(config: Config) -> Iterator[Mesh]:
    """The process group that the environment describes, left at the end; ConfigError if the config does not fit it."""
    try:
        mesh = create_mesh(
            tp=config.parallel.tp,
            ep=config.parallel.ep,
            device=config.run.device,
            timeout_minutes=config.run.timeout_minutes,
        )
    except ValueError as error:
        raise ConfigError(f"run.device = {config.run.device}, parallel.ep = {config.parallel.ep}: {error}") from None
    try:
        yield mesh
    except BaseException:
        # Leaving an NCCL group waits for kernels that wait for the other ranks, who do not know yet: just exit.
        if mesh.device.type == "cpu":
            destroy_mesh()
        raise
    destroy_mesh()
