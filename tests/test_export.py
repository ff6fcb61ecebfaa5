"""``torch.export`` of every function, with each size dynamic that its docstring does not fix."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves, tree_map_only

import calls
from calls import Call

pytestmark = pytest.mark.untyped


class Model(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, tensors: dict[str, Any]) -> Any:
        return self.call.run(**tensors)


def run(function: Any, tensors: dict[str, Any]) -> list[Any]:
    torch.manual_seed(0)
    return tree_leaves(function(tensors))


def check(call: Call) -> None:
    def dynamic(tensor: Tensor) -> dict[int, Any]:
        return {dim: Dim.DYNAMIC for dim in range(tensor.dim()) if call.is_open(tensor, dim)}

    tensors, larger = call.draw(), call.draw_larger()
    sizes = tree_map_only(Tensor, dynamic, tensors)
    model = Model(call)
    program = torch.export.export(model, (tensors,), dynamic_shapes=(sizes,), strict=False)
    expected = run(model, larger)
    torch.testing.assert_close(run(program.module(), larger), expected, equal_nan=True)


@calls.every_call
def test_every_open_size_is_dynamic(call: Call) -> None:
    check(call)


REFERENCES = {
    one.name: one
    for call in calls.all_calls()
    for one in call.of_implementations()
    if one.options[0].get("implementation") == "reference"
}


@pytest.mark.parametrize("name", REFERENCES)
def test_references(name: str) -> None:
    """The other implementations are operators, which export no more than the default."""
    check(REFERENCES[name])
