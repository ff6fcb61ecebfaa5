"""Calls that lead to the kernel with every rule, dtype and rounding."""

from functools import partial
from typing import Any

import torch

from tilework.optim._optimizer import triton
from tilework.optim._optimizer.updates import Part, Way

STATES = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adamw amsgrad": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "adabelief": ("exp_avg", "exp_avg_var"),
    "lion": ("exp_avg",),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _call(
    name: str,
    dtype: torch.dtype,
    rounding: str = "nearest",
    capturable: bool = False,
    state_dtype: torch.dtype = torch.float32,
) -> None:
    parameter = torch.empty(4099, dtype=dtype)
    states = {state: torch.empty(4099, dtype=state_dtype) for state in STATES[name]}
    if rounding == "kahan":
        states["compensation"] = parameter.clone()
    t = torch.ones(1, dtype=torch.float64) if capturable else 3
    numbers: dict[str, Any] = {"betas": (0.9, 0.99), "lr": 0.1, "eps": 1e-8, "t": t, "decay": 0.01}
    numbers |= {"step_size": 0.1 * t, "floor": 1e-8 * t, "root": 0.5, "adapts": 1.0}
    numbers |= {"weight_decouple": True}
    parts = [Part(parameter, parameter.clone(), states, None, 0)]
    triton.launch(name.split()[0], parts, [0], numbers, Way(capturable, rounding, 0))


LAUNCHES = [partial(_call, name, dtype) for name in STATES for dtype in DTYPES]
LAUNCHES += [
    partial(_call, name, torch.bfloat16, rounding, capturable=True)
    for name in STATES
    for rounding in ("stochastic", "kahan")
]
LAUNCHES += [
    partial(_call, "adamw amsgrad", torch.bfloat16, "stochastic", state_dtype=torch.bfloat16),
    partial(_call, "adamw amsgrad", torch.float32, capturable=True),
    partial(_call, "adamw amsgrad", torch.float64, state_dtype=torch.float64),
]
