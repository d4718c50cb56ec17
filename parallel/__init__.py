"""Device mesh, token dispatch, tensor parallelism, overlap, fused norms and gradient reduction."""

from moetrain.parallel.agreement import any_rank, first_on_each_node, on_all_ranks, on_rank_0, raise_together
from moetrain.parallel.allreduce_rmsnorm import (
    add_rmsnorm_all_gather,
    fused_allreduce_rmsnorm,
    reduce_scatter_add_rmsnorm,
    symmetric_empty,
)
from moetrain.parallel.dispatch import (
    AllToAllDispatcher,
    Dispatched,
    Dispatcher,
    LocalDispatcher,
    PairDispatcher,
)
from moetrain.parallel.gradients import clip_gradients, gradient_norm, reduce_gradients
from moetrain.parallel.mesh import Mesh, arranged, create_mesh, destroy_mesh, environment_world_size
from moetrain.parallel.overlap import Phases, complete, weave
from moetrain.parallel.sharding import ExpertSlots, Sharding
from moetrain.parallel.symmetric import check_symmetric
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
    "Phases",
    "Sharding",
    "add_rmsnorm_all_gather",
    "any_rank",
    "arranged",
    "check_symmetric",
    "clip_gradients",
    "complete",
    "create_mesh",
    "destroy_mesh",
    "embed",
    "environment_world_size",
    "first_on_each_node",
    "fused_allreduce_rmsnorm",
    "gather_rows",
    "gather_sequences",
    "gradient_norm",
    "on_all_ranks",
    "on_rank_0",
    "raise_together",
    "reduce_gradients",
    "reduce_scatter_add_rmsnorm",
    "split_cross_entropy",
    "sum_over_ranks",
    "sum_to_pieces",
    "symmetric_empty",
    "weave",
]
