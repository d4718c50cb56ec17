"""Device mesh, token dispatch, tensor parallelism and gradient reduction."""

from moetrain.parallel.agreement import any_rank, first_on_each_node, on_all_ranks, on_rank_0, raise_together
from moetrain.parallel.dispatch import (
    AllToAllDispatcher,
    Dispatched,
    Dispatcher,
    LocalDispatcher,
    PairDispatcher,
)
from moetrain.parallel.gradients import clip_gradients, gradient_norm, reduce_gradients
from moetrain.parallel.mesh import Mesh, create_mesh, destroy_mesh, environment_world_size
from moetrain.parallel.sharding import ExpertSlots, Sharding
from moetrain.parallel.tensor import (
    embed,
    gather_rows,
    gather_sequences,
    split_cross_entropy,
    sum_over_ranks,
    sum_to_pieces,
)

__all__ = [
    "AllToAllDispatcher",
    "Dispatched",
    "Dispatcher",
    "ExpertSlots",
    "LocalDispatcher",
    "Mesh",
    "PairDispatcher",
    "Sharding",
    "any_rank",
    "clip_gradients",
    "create_mesh",
    "destroy_mesh",
    "embed",
    "environment_world_size",
    "first_on_each_node",
    "gather_rows",
    "gather_sequences",
    "gradient_norm",
    "on_all_ranks",
    "on_rank_0",
    "raise_together",
    "reduce_gradients",
    "split_cross_entropy",
    "sum_over_ranks",
    "sum_to_pieces",
]
