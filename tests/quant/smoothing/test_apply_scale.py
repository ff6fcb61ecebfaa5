"""Folded factors change no output, and a refusal changes nothing."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tilework import norms
from tilework.quant import apply_scale_

MAKERS: dict[str, Any] = {
    "LayerNorm": lambda: nn.LayerNorm(6),
    "LayerNorm without bias": lambda: nn.LayerNorm(6, bias=False),
    "RMSNorm": lambda: nn.RMSNorm(6),
    "tilework LayerNorm": lambda: norms.LayerNorm(6),
    "tilework RMSNorm": lambda: norms.RMSNorm(6),
    "tilework RMSNorm around 1": lambda: norms.RMSNorm(6, weight_offset=1.0),
    "tilework PartialRMSNorm": lambda: norms.PartialRMSNorm(6, fraction=0.5),
    "Linear": lambda: nn.Linear(6, 6),
    "Linear without bias": lambda: nn.Linear(6, 6, bias=False),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_outputs_stay(kind: str) -> None:
    previous = MAKERS[kind]().double()
    with torch.no_grad():
        for parameter in previous.parameters():
            parameter.add_(torch.randn_like(parameter))
    layers = [nn.Linear(6, 3).double(), nn.Linear(6, 4, bias=False).double()]
    x = torch.randn(5, 6, dtype=torch.float64)
    before = [layer(previous(x)) for layer in layers]
    middle = previous(x)
    scale = torch.tensor([0.25, 0.5, 1.0, 2.0, 3.0, 7.0], dtype=torch.float64)
    parameters = [*previous.parameters(), *layers[0].parameters()]
    apply_scale_(previous, layers, scale)
    assert all(
        one is other
        for one, other in zip(
            parameters, [*previous.parameters(), *layers[0].parameters()], strict=True
        )
    )
    torch.testing.assert_close(previous(x), middle / scale)
    for layer, expected in zip(layers, before, strict=True):
        torch.testing.assert_close(layer(previous(x)), expected)


def test_half_precision_is_rounded_once() -> None:
    norm, layer = nn.RMSNorm(3).half(), nn.Linear(3, 2).half()
    weight = layer.weight.detach().clone()
    scale = torch.tensor([3.0, 0.1, 7.0])
    apply_scale_(norm, [layer], scale)
    assert torch.equal(layer.weight, (weight.double() * scale.double()).half())
    assert torch.equal(norm.weight, (1 / scale.double()).half())


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"previous": lambda: nn.BatchNorm1d(3)}, TypeError, "previous must be a norm"),
        (
            {"previous": lambda: nn.LayerNorm(3, elementwise_affine=False)},
            TypeError,
            "previous must have",
        ),
        ({"previous": lambda: nn.LayerNorm((1, 3))}, ValueError, "scale must be of the outputs"),
        (
            {"previous": lambda: nn.Linear(3, 4)},
            ValueError,
            "scale must be of the outputs of previous",
        ),
        ({"layers": lambda: []}, ValueError, "layers must be at least one nn.Linear"),
        (
            {"layers": lambda: [nn.Linear(3, 2), nn.Conv1d(3, 2, 1)]},
            TypeError,
            "layers must be of nn.Lin",
        ),
        (
            {"layers": lambda: [nn.Linear(3, 2), nn.Linear(4, 2)]},
            ValueError,
            r"scale must be of shape \(4",
        ),
        ({"scale": torch.tensor([1.0, 0.0, 2.0])}, ValueError, "scale must be above 0"),
        ({"scale": torch.tensor([1.0, -1.0, 2.0])}, ValueError, "scale must be above 0"),
        ({"scale": torch.tensor([1.0, torch.inf, 2.0])}, ValueError, "scale must be finite"),
        ({"scale": torch.tensor([1.0, torch.nan, 2.0])}, ValueError, "scale must be finite"),
        ({"scale": torch.ones(2)}, ValueError, r"scale must be of shape \(3,\)"),
        ({"scale": torch.ones(3).long()}, TypeError, "scale must be a floating-point tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_changes_nothing(change: Any, error: type[Exception], message: str) -> None:
    given = {"previous": nn.LayerNorm(3), "layers": [nn.Linear(3, 2)], "scale": torch.ones(3) * 2}
    given |= {name: value() if callable(value) else value for name, value in change.items()}
    modules = [given["previous"], *given["layers"]]
    before = [copy.deepcopy(module.state_dict()) for module in modules]  # type: ignore[union-attr]
    with pytest.raises(error, match=rf"^apply_scale_: {message}"):
        apply_scale_(**given)  # type: ignore[arg-type]
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(module.state_dict()[key], state[key]) for key in state)  # type: ignore[union-attr]


@pytest.mark.untyped
def test_a_layer_twice() -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"^apply_scale_: layers must be .* each once"):
        apply_scale_(nn.LayerNorm(3), [layer, layer], torch.ones(3))
