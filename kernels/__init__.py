"""Device code and its plain-PyTorch twins."""

from moetrain.kernels.expert_mlp import Activation, choose_backend, expert_mlp, gated_activation
from moetrain.kernels.routing import Routing

__all__ = ["Activation", "Routing", "choose_backend", "expert_mlp", "gated_activation"]
