"""Which expert is where when a run starts: as its file says, or as its checkpoint does.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.config import Config
from moetrain.errors import PlacementError
from moetrain.files import sha256
from moetrain.placement.placement import Placement, load_placement


@dataclass(frozen=True)
class ExpertPlacement:
    """Slots of the experts, and where they come from. What a checkpoint's manifest says under ``placement``."""

    num_gpus: int
    """ep."""
    slots: list[list[int]]
    """[L, E]: of each expert, a permutation in each layer; the first E / ep slots are on the first ep rank."""
    file_sha256: str | None
    """Of the `placement.file` with which the run started."""

    @property
    def assignment(self) -> list[list[int]]:
        """[L, E]: the ep rank of each expert."""
        share = len(self.slots[0]) // self.num_gpus
        return [[slot // share for slot in layer] for layer in self.slots]


def configured_placement(config: Config) -> Placement | None:
    """What `placement.file` holds; None without one.

    Raises PlacementError, which names the key, if it cannot be read, is of another model or number of GPUs, or has
    more experts on some GPUs than on others.
    """
    if config.placement.file is None:
        return None
    model, ep = config.model, config.parallel.ep
    layers = sum(model.is_moe_layer(layer) for layer in range(model.n_layers))
    try:
        placement = load_placement(Path(config.placement.file))
    except PlacementError as error:
        raise PlacementError(
            f"placement.file: {error}; `moetrain place` makes such files, and null leaves experts as they are numbered"
        ) from None
    key = f"placement.file = {config.placement.file}"
    if (placement.num_layers, placement.num_experts) != (layers, model.num_experts):
        raise PlacementError(
            f"{key}: is of {placement.num_layers} MoE layers of {placement.num_experts} experts, and the model has "
            f"{layers} of {model.num_experts}; make one from a trace of this model"
        )
    if placement.num_gpus != ep:
        raise PlacementError(
            f"{key}: is for {placement.num_gpus} GPUs, but parallel.ep = {ep}; set parallel.ep = "
            f"{placement.num_gpus}, or make one for as many GPUs as parallel.ep with `moetrain place --gpus`"
        )
    held_LG = placement.experts_LG
    if held_LG.min() != held_LG.max():
        raise PlacementError(
            f"{key}: puts {held_LG.min()} to {held_LG.max()} experts of a layer on a GPU; in training each has "
            f"{model.num_experts // ep}: leave --least and --most out when you make it"
        )
    return placement


def initial_placement(config: Config, saved: Mapping[str, Any] | None) -> tuple[ExpertPlacement | None, str | None]:
    """Where the experts are at the start, None for their own order; and a remark on it for the log.

    `saved`: the `progress` of the checkpoint from which the run goes on. If `placement.file` is what it was when that
    was written, or is there no more than then, experts stay where the checkpoint had them, as far as there are as many
    ep ranks: they may have moved since the start. A file that is new, changed or gone counts for more than the
    checkpoint. Weights and results are the same in any case. Raises PlacementError.
    """
    placement = configured_placement(config)
    digest = None if placement is None else sha256(Path(config.placement.file or ""))
    if config.parallel.ep == 1:
        return None, None
    record = None if saved is None else saved.get("placement")
    if record is not None:
        before = ExpertPlacement(**record)
        if before.file_sha256 == digest and before.num_gpus == config.parallel.ep:
            return before, "experts stay where the checkpoint had them"
    remark = None if placement is None else "experts are placed by placement.file"
    if record is not None:
        why = "placement.file has changed" if before.file_sha256 != digest else "parallel.ep has changed"
        remark = f"{remark or 'experts are placed by their numbers'}, not as in the checkpoint: {why}"
    if placement is None and config.placement.rebalance.every == 0:
        return None, remark
    if placement is None:
        layers = [layer for layer in range(config.model.n_layers) if config.model.is_moe_layer(layer)]
        placement = Placement.contiguous(len(layers), config.model.num_experts, config.parallel.ep)
    return ExpertPlacement(config.parallel.ep, placement.slots_LE.tolist(), digest), remark
