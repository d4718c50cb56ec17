"""Device code and its plain-PyTorch twins."""

from moetrain.kernels.activation import Activation, GatedActivation, activate
from moetrain.kernels.expert_mlp import choose_backend, expert_mlp
from moetrain.kernels.routing import Routing
from moetrain.kernels.topk import topk_softmax

__all__ = ["Activation", "GatedActivation", "Routing", "activate", "choose_backend", "expert_mlp", "topk_softmax"]
