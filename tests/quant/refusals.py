"""What every function of weights refuses."""

from typing import Any

import torch

from samples import Refusal

WEIGHTS: tuple[Refusal, ...] = (
    ("weight must be a non-empty matrix", ValueError, {"weight": torch.ones(3)}),
    ("weight must be a non-empty matrix", ValueError, {"weight": torch.ones(0, 3)}),
    ("weight must be a floating-point tensor", TypeError, {"weight": torch.ones(2, 3).long()}),
    ("weight must be a floating-point tensor", TypeError, {"weight": torch.ones(2, 3).cfloat()}),
    ("weight must be finite", ValueError, {"weight": torch.full((2, 3), torch.nan)}),
    ("weight must be finite", ValueError, {"weight": torch.full((2, 3), -torch.inf)}),
)
GRIDS: tuple[Refusal, ...] = (
    ("bits must be an int", TypeError, {"bits": True}),
    ("bits must be an int", TypeError, {"bits": 4.0}),
    ("bits must be an int from 1 to 8", ValueError, {"bits": 0}),
    ("bits must be an int from 1 to 8", ValueError, {"bits": 9}),
    ("bits must be an int from 2 to 8", ValueError, {"bits": 1, "scheme": "symmetric"}),
    ("bits must be an int from 2 to 8", ValueError, {"bits": 1, "scheme": "restricted"}),
    ("group_size must be an int of at least 1", ValueError, {"group_size": -1}),
    ("group_size must be an int of at least 1", ValueError, {"group_size": 0}),
    ("group_size must be an int", TypeError, {"group_size": 2.0}),
    ("scheme must be one of 'asymmetric', 'symmetric'", ValueError, {"scheme": "sym"}),
)
AXES: tuple[Refusal, ...] = (
    ("axis must be one of 'out', 'in', 'tensor'", ValueError, {"axis": "row"}),
    ("group_size must be None", ValueError, {"axis": "tensor", "group_size": 2}),
)
_NOT_SYMMETRIC = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
_INDEFINITE = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
HESSIANS: tuple[Refusal, ...] = (
    (r"hessian must be of shape \(3, 3\)", ValueError, {"hessian": torch.eye(2)}),
    ("hessian must be a floating-point tensor", TypeError, {"hessian": torch.eye(3).long()}),
    ("hessian must be finite", ValueError, {"hessian": torch.full((3, 3), torch.nan)}),
    ("hessian must be symmetric", ValueError, {"hessian": _NOT_SYMMETRIC}),
    ("hessian must be positive definite with damp=0.01", ValueError, {"hessian": _INDEFINITE}),
    ("damp must be a finite number of at least 0", ValueError, {"damp": -0.1}),
    ("damp must be a number", TypeError, {"damp": "0.1"}),
)
INPUTS: tuple[Refusal, ...] = (
    (r"input must be non-empty of shape \(..., 3\)", ValueError, {"input": torch.ones(2, 2)}),
    (r"input must be non-empty of shape \(..., 3\)", ValueError, {"input": torch.ones(0, 3)}),
    (r"input must be non-empty of shape \(..., 3\)", ValueError, {"input": torch.tensor(1.0)}),
    ("input must be a floating-point tensor", TypeError, {"input": torch.ones(2, 3).long()}),
    ("input must be finite", ValueError, {"input": torch.full((2, 3), torch.nan)}),
    ("input must be finite", ValueError, {"input": torch.full((2, 3), torch.inf)}),
)


def weight_and_input() -> dict[str, Any]:
    """Arguments that are accepted."""
    return {"weight": torch.ones(2, 3), "input": torch.ones(2, 3)}


def weight_and_hessian() -> dict[str, Any]:
    """Arguments that are accepted."""
    return {"weight": torch.ones(2, 3), "hessian": torch.eye(3)}
