"""Markers for machines with GPUs, and what several test files share."""

from __future__ import annotations

import os
from pathlib import Path

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


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand bytes of text, built once."""
    from moetrain.data.build import build
    from moetrain.data.tokenizer import BytesTokenizer

    folder = tmp_path_factory.mktemp("data")
    for number in range(40):
        text = "\n".join(f"{number + i} squared is {(number + i) ** 2}" for i in range(20))
        (folder / f"{number:02}.txt").write_text(text)
    out = folder / "built"
    build([str(folder)], out, BytesTokenizer(), held_out_fraction=0.2, workers=1, progress=False)
    return out
