"""An answer: which GPU holds each expert of each MoE layer, and its file.

Shapes: L MoE layers, E experts, G GPUs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.errors import PlacementError
from moetrain.files import write_text

Assignment = NDArray[np.int64]
"""[L, E]: the GPU of each expert."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the experts are. Raises PlacementError where a GPU does not exist."""

    gpu_LE: Assignment
    num_gpus: int

    def __post_init__(self) -> None:
        if self.gpu_LE.ndim != 2 or self.gpu_LE.size == 0:
            raise PlacementError(f"assignment has shape {list(self.gpu_LE.shape)}, not [layers, experts]")
        if self.gpu_LE.min() < 0 or self.gpu_LE.max() >= self.num_gpus:
            raise PlacementError(f"assignment names a GPU beyond 0 to {self.num_gpus - 1}")

    @property
    def num_layers(self) -> int:
        return self.gpu_LE.shape[0]

    @property
    def num_experts(self) -> int:
        return self.gpu_LE.shape[1]

    @property
    def experts_LG(self) -> NDArray[np.int64]:
        """[L, G]: how many experts each GPU holds."""
        return np.stack([np.bincount(gpu_E, minlength=self.num_gpus) for gpu_E in self.gpu_LE])

    @property
    def slots_LE(self) -> NDArray[np.int64]:
        """[L, E]: each expert's place when those of a layer stand in order of their GPUs, and then of their numbers.

        With E / G experts on every GPU, slot s is on GPU s // (E / G).
        """
        order_LE = np.argsort(self.gpu_LE, axis=1, kind="stable")
        return np.argsort(order_LE, axis=1, kind="stable")

    @staticmethod
    def contiguous(num_layers: int, num_experts: int, num_gpus: int) -> Placement:
        """Expert e on GPU ⌊e·G/E⌋, in every layer: what a model has without a placement."""
        gpu_E = np.arange(num_experts, dtype=np.int64) * num_gpus // num_experts
        return Placement(np.tile(gpu_E, (num_layers, 1)), num_gpus)


def save_placement(path: Path, placement: Placement, **facts: Any) -> None:
    """Write placement.json; `facts` are further keys of it, as `objective`, `cost` and `bound`."""
    record = {
        "num_layers": placement.num_layers,
        "num_experts": placement.num_experts,
        "num_gpus": placement.num_gpus,
        **facts,
        "assignment": placement.gpu_LE.tolist(),
    }
    write_text(path, json.dumps(record) + "\n")


def load_placement(path: Path) -> Placement:
    """Read placement.json. Raises PlacementError, which names the file and what is wrong in it."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        layers, experts, gpus, assignment = (
            record[key] for key in ("num_layers", "num_experts", "num_gpus", "assignment")
        )
    except OSError as error:
        raise PlacementError(f"{path}: {error.strerror}") from None
    except KeyError as error:
        raise PlacementError(f"{path}: no key {error}") from None
    except TypeError:
        raise PlacementError(f"{path}: holds no JSON object") from None
    except (ValueError, RecursionError) as error:
        raise PlacementError(f"{path}: no JSON: {error}") from None
    try:
        gpu_LE = np.array(assignment)
    except ValueError:
        raise PlacementError(f"{path}: assignment has layers of different lengths") from None
    if gpu_LE.size and gpu_LE.dtype != np.int64:
        raise PlacementError(f"{path}: assignment has something else than whole numbers")
    if type(gpus) is not int or gpus < 1:
        raise PlacementError(f"{path}: num_gpus is {gpus}, no number of GPUs")
    try:
        placement = Placement(gpu_LE, gpus)
    except PlacementError as error:
        raise PlacementError(f"{path}: {error}") from None
    if (layers, experts) != gpu_LE.shape:
        raise PlacementError(
            f"{path}: num_layers × num_experts is {layers} × {experts}, but the assignment is "
            f"{gpu_LE.shape[0]} × {gpu_LE.shape[1]}"
        )
    return placement
