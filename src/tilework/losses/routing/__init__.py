"""The router of a mixture of experts: its gate and its losses."""

from tilework.losses.routing.load_balancing_loss import (
    GlobalLoadBalancer,
    expert_counts,
    load_balancing_loss,
)
from tilework.losses.routing.topk_softmax_gate import TopKGate, topk_softmax_gate

__all__ = [
    "GlobalLoadBalancer",
    "TopKGate",
    "expert_counts",
    "load_balancing_loss",
    "topk_softmax_gate",
]
