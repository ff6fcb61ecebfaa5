"""The norm loss, against its closed form."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tilework.losses import NormLoss, norm_loss

import processes
import samples
from losses.samples import Loss


def definition(weight: Tensor, *, coefficient: float = 0.01) -> Tensor:
    rows = weight.reshape(weight.shape[0], -1) if weight.numel() else weight.flatten(1)
    return coefficient * (1 - rows.square().sum(1).sqrt()).square().sum()


def weight_of(*shape: int) -> dict[str, Tensor]:
    return {"weight": torch.randn(shape, dtype=torch.float64)}


@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            norm_loss,
            definition,
            None,
            lambda: weight_of(7, 5),
            options=({}, {"coefficient": 0.7}),
            differentiable=("weight",),
            batched=("weight",),
            class_index=False,
            mean_of_nothing=0.0,
            accepts={"weight": torch.zeros(2, 3)},
            refuses=(
                (
                    "weight must be of at least 2 dimensions, got",
                    ValueError,
                    {"weight": torch.zeros(3)},
                ),
                (
                    r"weight\[1\] must be of at least 2 dim",
                    ValueError,
                    {"weight": [torch.zeros(3, 2), torch.zeros(3)]},
                ),
                (
                    r"weight\[1\] must lie on the device of",
                    ValueError,
                    {"weight": [torch.zeros(3, 2), torch.zeros(3, 2, device="meta")]},
                ),
                (
                    r"weight\[0\] must be a floating-point tensor",
                    TypeError,
                    {"weight": [torch.zeros(3, 2).int()]},
                ),
                ("weight must be a floating-point tensor or a", ValueError, {"weight": []}),
                ("weight must be a floating-point tensor or a", TypeError, {"weight": 1.0}),
                ("coefficient must be a finite number", ValueError, {"coefficient": -1.0}),
            ),
        ),
        Loss(
            norm_loss,
            definition,
            None,
            lambda: weight_of(3, 2, 3, 3),
            differentiable=("weight",),
            batched=("weight",),
            class_index=False,
            mean_of_nothing=0.0,
        ),
    ]


def test_is_0_only_for_rows_of_norm_1() -> None:
    rows = torch.randn(5, 7).double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    assert norm_loss(rows, coefficient=1.0) < 1e-30
    rows[2] *= 1.5
    assert norm_loss(rows, coefficient=1.0).item() == pytest.approx(0.25)


def test_does_not_see_an_orthogonal_map_of_the_inputs() -> None:
    weight = torch.randn(5, 7).double()
    orthogonal = torch.linalg.qr(torch.randn(7, 7).double()).Q
    torch.testing.assert_close(norm_loss(weight @ orthogonal), norm_loss(weight))


def test_gradient_in_closed_form() -> None:
    weight = torch.randn(5, 3, 2).double()
    weight[1] = 0
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(norm_loss(weight, coefficient=0.3), weight, create_graph=True)
    norms = weight.detach().flatten(1).norm(dim=1).reshape(-1, 1, 1)
    expected = 0.6 * (1 - 1 / norms) * weight.detach()
    expected[1] = 0
    torch.testing.assert_close(gradient.detach(), expected)


def test_several_weights() -> None:
    weights = [torch.randn(3, 4), torch.randn(2, 3, 5).bfloat16(), torch.randn(1, 1)]
    expected = sum(definition(weight.double()) for weight in weights)
    actual = norm_loss(iter(weights))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.as_tensor(expected).float())
    assert norm_loss([weights[1], weights[1].half()]).dtype == torch.float32
    assert norm_loss(torch.zeros(3, 0), coefficient=1.0) == 3


def test_of_a_model() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                [nn.Conv1d(2, 3, 3), nn.Conv2d(2, 3, 3), nn.Conv3d(1, 2, 3), nn.Linear(4, 5)]
            )
            self.norm = nn.LayerNorm(4)
            self.embedding = nn.Embedding(5, 4)
            self.tied = nn.Linear(4, 5)
            self.tied.weight = self.layers[3].weight  # type: ignore[assignment]

    model = Block()
    expected = sum(definition(layer.weight.double(), coefficient=0.2) for layer in model.layers)
    loss = NormLoss(coefficient=0.2)(model)
    torch.testing.assert_close(loss.double(), torch.as_tensor(expected), rtol=1e-6, atol=0)
    loss.backward()
    assert model.layers[0].weight.grad is not None
    assert model.embedding.weight.grad is None
    assert repr(NormLoss(coefficient=0.2)) == "NormLoss(coefficient=0.2)"


def sharded_model() -> list[Tensor]:
    """The loss after a forward pass, when some weights are gathered, and the gradients."""
    model = a_model()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh)
    output = model(torch.ones(4, 3))
    kinds = {isinstance(layer.weight, DTensor) for layer in model}
    assert True in kinds
    loss = NormLoss(coefficient=0.5)(model)
    (output.sum() + loss).backward()
    gradients = [layer.weight.grad.full_tensor() for layer in model]
    columns = distribute_tensor(torch.arange(6.0).reshape(2, 3), mesh, [Shard(1)])
    return [loss.detach(), *gradients, norm_loss(columns)]


def a_model() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7), nn.Linear(7, 2))


def test_of_a_sharded_model() -> None:
    model = a_model()
    loss = NormLoss(coefficient=0.5)(model)
    (model(torch.ones(4, 3)).sum() + loss).backward()
    columns = norm_loss(torch.arange(6.0).reshape(2, 3))
    expected = [loss.detach(), *(layer.weight.grad for layer in model), columns]
    for results in processes.run(sharded_model, 2):
        for result, value in zip(results, expected, strict=True):
            torch.testing.assert_close(result, value)


@pytest.mark.untyped
def test_bad_models() -> None:
    with pytest.raises(ValueError, match="norm_loss: coefficient must be a finite number"):
        NormLoss(coefficient=-1.0)
    with pytest.raises(ValueError, match="NormLoss: model must have a layer of Linear, Conv1d, C"):
        NormLoss()(nn.LayerNorm(3))
    with pytest.raises(TypeError, match=r"NormLoss: model must be an nn\.Module"):
        NormLoss()(torch.zeros(3, 2))  # type: ignore[arg-type]
