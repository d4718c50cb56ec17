"""Engines: who owns gradients, optimiser and their sharding, behind one interface.

``deepspeed`` is imported by those who choose it only, for it imports DeepSpeed.
"""

from moetrain.parallel.engines.base import Engine, OptimizerBuilder
from moetrain.parallel.engines.fsdp import FsdpEngine, Unit
from moetrain.parallel.engines.replicated import ReplicatedEngine

__all__ = ["Engine", "FsdpEngine", "OptimizerBuilder", "ReplicatedEngine", "Unit"]
