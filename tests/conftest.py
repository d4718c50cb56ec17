"""Markers for machines with GPUs, and what several test files share."""

from __future__ import annotations

import os

import pytest
import torch

# Triton kernels run in its interpreter where there is no GPU; triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Ranks are processes here; threads of several of them on few cores spend their time waiting for one another.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count()
    for item in items:
        for marker, needed in (("gpu", 1), ("gpu2", 2)):
            if item.get_closest_marker(marker) and gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA GPU(s), found {gpus}"))
