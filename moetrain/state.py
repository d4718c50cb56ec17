"""What a checkpoint holds of a run's model: logical tensors by name, whatever topology and engine."""

from __future__ import annotations

from torch import Tensor

from moetrain.model import Decoder
from moetrain.parallel.engines import Engine


def logical_tensors(model: Decoder, engine: Engine | None = None) -> dict[str, Tensor]:
    """Parameters and buffers as ``model.<name>``, the optimiser's state as ``optim.<key>.<parameter>``.

    What is split, and what the optimiser keeps for it, are parts of DTensors of the logical shape. Without an engine:
    parameters and buffers of a model as it was built. The tensors share memory with the model, those of an engine as
    far as :meth:`Engine.restore` does not say otherwise. Collective.
    """
    own = model.state_dict() if engine is None else dict(model.named_buffers())
    tensors = {f"model.{name}": model.sharding(name).logical(tensor) for name, tensor in own.items()}
    return tensors if engine is None else tensors | engine.tensors()
