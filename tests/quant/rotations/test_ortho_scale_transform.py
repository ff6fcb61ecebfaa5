"""A pair of transforms that undo each other, for any scale and rotation."""

import pytest
import torch
from torch import nn

from tilework.quant import CayleyAdam, OrthoScaleTransform, random_orthogonal_matrix


def transform() -> OrthoScaleTransform:
    result = OrthoScaleTransform(6, dtype=torch.float64)
    with torch.no_grad():
        result.rotation.copy_(random_orthogonal_matrix(6, dtype=torch.float64))
        result.log_scale.normal_()
    return result


def test_layers_on_both_sides_undo_it() -> None:
    T = transform()
    before, after = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    middle = before(x)
    torch.testing.assert_close(T(middle), (middle * T.log_scale.exp()) @ T.rotation)
    weight = T.transform_weight(after.weight)
    torch.testing.assert_close(T(middle) @ weight.T, middle @ after.weight.T)
    written, bias = T.transform_output_weight(before.weight, before.bias)
    torch.testing.assert_close(x @ written.T + bias, T(middle))
    torch.testing.assert_close(T.transform_output_weight(before.weight), written)


def test_it_begins_as_the_identity_and_trains() -> None:
    T = OrthoScaleTransform(4)
    x = torch.randn(3, 4)
    assert torch.equal(T(x), x)
    assert {name: p.shape for name, p in T.named_parameters()} == {
        "rotation": (4, 4),
        "log_scale": (4,),
    }
    optimizers = CayleyAdam([T.rotation], 0.1), torch.optim.SGD([T.log_scale], 0.1)
    for _ in range(3):
        loss = T(x).pow(4).mean() + T.transform_weight(torch.ones(2, 4)).pow(4).mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(T.rotation.T @ T.rotation, torch.eye(4))
    assert T.log_scale.abs().min() > 0
    assert "dim=4" in repr(T)


@pytest.mark.untyped
def test_refusals() -> None:
    T = OrthoScaleTransform(4)
    with pytest.raises(ValueError, match=r"^OrthoScaleTransform: dim must be an int of at least 1"):
        OrthoScaleTransform(0)
    with pytest.raises(ValueError, match=r"^OrthoScaleTransform: input must be of 4 in its last"):
        T(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"^OrthoScaleTransform: weight must be of 4 in its last"):
        T.transform_weight(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"^OrthoScaleTransform: weight must be of 4 in its first"):
        T.transform_output_weight(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"^OrthoScaleTransform: bias must be of 4 in its last"):
        T.transform_output_weight(torch.ones(4, 3), torch.ones(3))
