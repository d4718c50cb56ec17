"""Where the ranks first meet: that all have come, with the same software and config and a device for each.

It needs no more than the store through which process groups are made, and so comes before them and any GPU work.
"""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

import moetrain
from moetrain.errors import ConfigError, UserError
from moetrain.parallel.mesh import available_device, environment_world_size

HEARD_SECONDS = 5.0
"""For which rank 0 lets the others hear that it ends, and why."""


def meet(settings: Mapping[str, object], device: str, timeout_minutes: float) -> dist.Store | None:
    """The store of the ranks that the launcher started, once all have come to it and been found alike.

    None for a single process and in a mock world. `settings`, the config's values by key, and versions must be the
    same on all ranks, and each rank needs a GPU if `device` is "cuda", or "auto" where there are GPUs. Otherwise every
    rank raises the same ConfigError, which names ranks and values, or the ranks that did not come in time; UserError if
    rank 0 did not.
    """
    size = environment_world_size()
    if size == 1 or "MASTER_ADDR" not in os.environ or dist.is_initialized():
        return None
    rank, timeout = int(os.environ["RANK"]), timedelta(minutes=timeout_minutes)
    where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
    except (ValueError, dist.DistError) as error:
        raise UserError(f"the ranks have not met at {where}: {str(error).splitlines()[0]}") from error
    if device == "auto":
        device = available_device()
    facts = {**_software(), "device": device, **{key: str(value) for key, value in settings.items()}}
    account = {"problem": _problem(device), "facts": facts}
    store.set(f"environment/{rank}", json.dumps(account))
    if rank == 0:
        store.set("environment/verdict", _verdict(store, size, timeout))
    try:
        # Rank 0 may have begun to wait later than this one.
        store.wait(["environment/verdict"], 1.5 * timeout)
        verdict = store.get("environment/verdict").decode()
    except dist.DistStoreError:
        raise UserError(f"rank 0 has not come to {where} within {timeout_minutes:g} minutes") from None
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"rank 0, or its launcher, has left {where} before the ranks have met: {reason}") from None
    if verdict:
        store.set(f"environment/heard/{rank}", "")
        if rank == 0:  # with which the store may go
            with suppress(dist.DistStoreError):
                store.wait([f"environment/heard/{other}" for other in range(size)], timedelta(seconds=HEARD_SECONDS))
        raise ConfigError(verdict)
    return store


def _software() -> dict[str, str]:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "moetrain": moetrain.__version__,
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "triton": triton,
    }


def _problem(device: str) -> str | None:
    """What this rank lacks by itself."""
    if device == "cpu":
        return None
    gpus, local_rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= gpus:
        processes = os.environ.get("LOCAL_WORLD_SIZE", "?")
        return f"no GPU for local rank {local_rank} on {socket.gethostname()}: {gpus} visible, {processes} processes"
    return None if dist.is_nccl_available() else "this torch comes without NCCL"


def _verdict(store: dist.Store, size: int, timeout: timedelta) -> str:
    """What is wrong, "" if nothing: read by rank 0 for all."""
    names = [f"environment/{rank}" for rank in range(size)]
    try:
        store.wait(names, timeout)
    except dist.DistStoreError:
        missing = [rank for rank, name in enumerate(names) if not store.check([name])]
        minutes = timeout.total_seconds() / 60
        return f"{name_ranks(missing)} did not come within {minutes:g} minutes (run.timeout_minutes and some grace)"
    accounts = [json.loads(text) for text in store.multi_get(names)]
    alone = _by_value([account["problem"] for account in accounts])
    problems = [f"{name_ranks(ranks)}: {problem}" for problem, ranks in alone.items() if problem is not None]
    if problems:
        return "; ".join(problems) + "; start fewer processes, or set CUDA_VISIBLE_DEVICES or run.device"
    software, settings = set(_software()), []
    for name in accounts[0]["facts"]:
        values = _by_value([account["facts"].get(name) for account in accounts])
        if len(values) > 1:
            settings.append(name)
            problems.append(
                f"{name} = " + ", ".join(f"{value} ({name_ranks(ranks)})" for value, ranks in values.items())
            )
    if not problems:
        return ""
    alike = "install the same versions" if software & set(settings) else "give the same config and overrides"
    return f"the ranks differ: {'; '.join(problems[:5])}{'; …' * (len(problems) > 5)}; {alike} on every node"


def _by_value(values: Sequence[str | None]) -> dict[str | None, list[int]]:
    """value → the ranks that have it."""
    ranks: dict[str | None, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ranks


def name_ranks(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 0–3, 8"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    listed = ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in spans)
    return f"rank{'s' * (len(ranks) != 1)} {listed}"
