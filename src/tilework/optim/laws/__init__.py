"""Laws of training: how rates, batch sizes, decay and loss depend on each other."""

from tilework.optim.laws.adamw_timescale import (
    adamw_timescale,
    critical_batch_size,
    optimal_batch_size,
    optimal_weight_decay,
)
from tilework.optim.laws.lr_annealing_law import (
    LRAnnealingLaw,
    fit_lr_annealing_law,
    lr_annealing_areas,
)
from tilework.optim.laws.lr_scaling_exponents import lr_scaling_exponents
from tilework.optim.laws.lr_sensitivity import lr_sensitivity
from tilework.optim.laws.normalized_weight_decay import normalized_weight_decay
from tilework.optim.laws.scale_lr import (
    batch_hessian_edge,
    max_lr_rmt,
    polyak_hyperparameters,
    scale_lr,
)

__all__ = [
    "LRAnnealingLaw",
    "adamw_timescale",
    "batch_hessian_edge",
    "critical_batch_size",
    "fit_lr_annealing_law",
    "lr_annealing_areas",
    "lr_scaling_exponents",
    "lr_sensitivity",
    "max_lr_rmt",
    "normalized_weight_decay",
    "optimal_batch_size",
    "optimal_weight_decay",
    "polyak_hyperparameters",
    "scale_lr",
]
