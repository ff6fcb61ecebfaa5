"""Folded rotations and gains leave what a network computes as it is."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tilework import norms
from tilework.quant import fold_norm_, random_orthogonal_matrix, rotate_linear_


def test_both_sides() -> None:
    layer = nn.Linear(5, 4).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    before = layer(x)
    inner, outer = (random_orthogonal_matrix(n, dtype=torch.float64) for n in (5, 4))
    rotate_linear_(layer, inner)
    torch.testing.assert_close(layer(x @ inner), before)
    rotate_linear_(layer, outer, side="output")
    torch.testing.assert_close(layer(x @ inner), before @ outer)
    plain = nn.Linear(5, 4, bias=False).double()
    before = plain(x)
    rotate_linear_(plain, outer, side="output")
    torch.testing.assert_close(plain(x), before @ outer)


def test_half_precision_is_rounded_once() -> None:
    layer, rotation = nn.Linear(4, 3).bfloat16(), random_orthogonal_matrix(4)
    weight = layer.weight.detach().clone()
    rotate_linear_(layer, rotation)
    assert torch.equal(layer.weight, (weight.double() @ rotation.double()).bfloat16())


class Stream(nn.Module):
    """A residual stream with two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.norm, self.up, self.down = nn.RMSNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.last, self.head = nn.RMSNorm(8), nn.Linear(8, 9)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(self.last(x))


def test_a_residual_stream() -> None:
    model = Stream().double()
    for norm in (model.norm, model.last):
        nn.init.normal_(norm.weight)
    ids = torch.arange(9)
    before = model(ids)
    fold_norm_(model.norm, [model.up])
    fold_norm_(model.last, [model.head])
    torch.testing.assert_close(model(ids), before)
    rotation = random_orthogonal_matrix(8, dtype=torch.float64)
    with torch.no_grad():
        model.embedding.weight.copy_(model.embedding.weight @ rotation)
    rotate_linear_(model.up, rotation)
    rotate_linear_(model.head, rotation)
    rotate_linear_(model.down, rotation, side="output")
    torch.testing.assert_close(model(ids), before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LayerNorm(5),
        lambda: nn.LayerNorm(5, bias=False),
        lambda: nn.RMSNorm(5),
        lambda: norms.LayerNorm(5),
        lambda: norms.RMSNorm(5, weight_offset=1.0),
        lambda: norms.PartialRMSNorm(5, fraction=0.6),
    ],
)
def test_norms(make: Any) -> None:
    norm = make().double()
    layers = [nn.Linear(5, 3).double(), nn.Linear(5, 2).double()]
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 5, dtype=torch.float64)
    before = [layer(norm(x)) for layer in layers]
    fold_norm_(norm, layers)
    assert torch.equal(norm.weight + getattr(norm, "weight_offset", 0.0), torch.ones(5).double())
    if norm._parameters.get("bias") is not None:
        assert not norm.bias.any()
    for layer, expected in zip(layers, before, strict=True):
        torch.testing.assert_close(layer(norm(x)), expected)
    alone = nn.LayerNorm(5, elementwise_affine=False)
    weight = layers[0].weight.detach().clone()
    fold_norm_(alone, layers)
    assert torch.equal(layers[0].weight, weight)


@pytest.mark.untyped
def test_refusals() -> None:
    layer = nn.Linear(3, 2)
    for rotation, error, message in [
        (torch.ones(3, 3), ValueError, "rotation must be orthogonal"),
        (torch.eye(2), ValueError, r"rotation must be of shape \(3, 3\)"),
        (torch.eye(3).long(), TypeError, "rotation must be a floating-point tensor"),
    ]:
        with pytest.raises(error, match=rf"^rotate_linear_: {message}"):
            rotate_linear_(layer, rotation)
    with pytest.raises(ValueError, match=r"^rotate_linear_: rotation must be of shape \(2, 2\)"):
        rotate_linear_(layer, torch.eye(3), side="output")
    with pytest.raises(ValueError, match=r"^rotate_linear_: side must be one of"):
        rotate_linear_(layer, torch.eye(3), side="both")
    with pytest.raises(TypeError, match=r"^rotate_linear_: linear must be an nn.Linear"):
        rotate_linear_(nn.Conv1d(3, 2, 1), torch.eye(3))  # type: ignore[arg-type]


@pytest.mark.untyped
def test_a_refused_fold_changes_nothing() -> None:
    norm = nn.LayerNorm(3)
    nn.init.normal_(norm.weight)
    good, bare, wide = nn.Linear(3, 2), nn.Linear(3, 2, bias=False), nn.Linear(4, 2)
    before = copy.deepcopy(good.state_dict())
    for wrong, error, message in [
        ([good, bare], ValueError, "layers must have a bias"),
        ([good, wide], ValueError, r"layers must be of layers with \(3,\) inputs"),
        ([good, good], ValueError, "layers must be at least one nn.Linear, each once"),
        ([], ValueError, "layers must be at least one nn.Linear"),
        ([good, nn.Identity()], TypeError, "layers must be of nn.Linear"),
    ]:
        with pytest.raises(error, match=rf"^fold_norm_: {message}"):
            fold_norm_(norm, wrong)  # type: ignore[arg-type]
        assert all(torch.equal(good.state_dict()[key], before[key]) for key in before)
    with pytest.raises(TypeError, match=r"^fold_norm_: norm must be a norm"):
        fold_norm_(nn.BatchNorm1d(3), [good])
