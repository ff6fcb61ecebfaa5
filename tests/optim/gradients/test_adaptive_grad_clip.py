"""Adaptive gradient clipping, against loops over units."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tilework.optim import adaptive_grad_clip_

import processes
import samples
from calls import Call, draw
from helpers import FLOATING, HALF, dtype_name

SHAPES = ((), (1,), (7,), (1, 1), (5, 3), (4, 1, 3), (3, 2, 3, 3))


def norm(values: list[float], order: float) -> float:
    if order == math.inf:
        return max((abs(value) for value in values), default=0.0)
    return math.fsum(abs(value) ** order for value in values) ** (1 / order)


def by_loops(
    weight: Tensor, grad: Tensor, clip_factor: float, eps: float, norm_type: float
) -> tuple[Tensor, list[bool]]:
    """The clipped gradient in float64, and which units are clipped."""
    units = len(weight) if weight.dim() > 1 else 1
    rows = []
    clipped = []
    for w, g in zip(
        weight.double().reshape(units, -1).tolist(),
        grad.double().reshape(units, -1).tolist(),
        strict=True,
    ):
        most = clip_factor * max(norm(w, norm_type), eps)
        size = norm(g, norm_type)
        clipped.append(size > most)
        rows.append([value * most / size for value in g] if size > most else g)
    return torch.tensor(rows, dtype=torch.float64).reshape(weight.shape), clipped


def a_parameter(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64, scale: float = 0.02
) -> nn.Parameter:
    """One of whose units some are above the bound of the default factor, and some below."""
    parameter = nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype))
    grad = torch.randn(shape, dtype=torch.float64)
    if len(shape) > 1:
        grad *= torch.linspace(0.1, 1.5, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    parameter.grad = (scale * grad).to(dtype)
    return parameter


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf])
def test_equals_loops(dtype: torch.dtype, norm_type: float) -> None:
    parameters = [a_parameter(shape, dtype) for shape in SHAPES]
    parameters.insert(2, nn.Parameter(torch.ones(3)))  # without a gradient
    options = {"clip_factor": 0.015, "eps": 0.5, "norm_type": norm_type}
    wanted = [p for p in parameters if p.grad is not None]
    before = [p.grad.clone() for p in wanted]
    same = [p.grad for p in wanted]
    weights = [p.detach().clone() for p in parameters]
    truth = [by_loops(p.detach(), p.grad, **options) for p in wanted]
    count = adaptive_grad_clip_(iter(parameters), **options)
    assert count.dtype == torch.int64
    assert count.shape == ()
    flags = [flag for _, clipped in truth for flag in clipped]
    assert count.item() == sum(flags)
    assert 5 < sum(flags) < len(flags)
    rtol = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps * (2 if dtype in HALF else 8)
    for parameter, old, (expected, clipped), grad in zip(wanted, before, truth, same, strict=True):
        assert parameter.grad is grad
        torch.testing.assert_close(grad.double(), expected, rtol=rtol, atol=1e-7)
        if parameter.dim() > 1:
            left = ~torch.tensor(clipped)
            assert torch.equal(grad[left], old[left])
        elif not clipped[0]:
            assert torch.equal(grad, old)
    for parameter, weight in zip(parameters, weights, strict=True):
        assert torch.equal(parameter, weight)


@given(
    st.floats(1e-3, 10),
    st.floats(1e-4, 1),
    st.sampled_from([1.0, 2.0, math.inf]),
    st.floats(1e-3, 100),
    st.integers(0, 2**32),
)
def test_properties(
    clip_factor: float, eps: float, norm_type: float, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    parameter = a_parameter((6, 5), scale=scale)
    options = {"eps": eps, "norm_type": norm_type}
    before = parameter.grad.clone()
    count = adaptive_grad_clip_(parameter, clip_factor, **options)
    weights, after, old = (
        torch.linalg.vector_norm(t, norm_type, 1)
        for t in (parameter.detach(), parameter.grad, before)
    )
    most = clip_factor * weights.clamp(min=eps)
    assert (after <= most * (1 + 1e-12)).all()
    torch.testing.assert_close(parameter.grad * old[:, None], before * after[:, None])
    once = parameter.grad.clone()
    adaptive_grad_clip_(parameter, clip_factor, **options)
    torch.testing.assert_close(parameter.grad, once, rtol=1e-14, atol=0)
    if (weights > eps).all():
        larger = nn.Parameter(8 * parameter.detach())
        larger.grad = 8 * before
        assert torch.equal(adaptive_grad_clip_(larger, clip_factor, **options), count)
        assert torch.equal(larger.grad, 8 * once)


def test_strides_and_sizes() -> None:
    weight = nn.Parameter(torch.randn(3, 5).double().t())
    weight.grad = torch.randn(5, 6).double()[:, ::2]
    expected, clipped = by_loops(weight.detach(), weight.grad, 0.01, 1e-3, 2.0)
    assert adaptive_grad_clip_([weight]).item() == sum(clipped)
    torch.testing.assert_close(weight.grad, expected)
    for shape in ((0,), (0, 3), (3, 0)):
        empty = nn.Parameter(torch.zeros(shape))
        empty.grad = torch.zeros(shape)
        assert adaptive_grad_clip_(empty, norm_type=math.inf) == 0
    assert adaptive_grad_clip_([]) == 0
    assert adaptive_grad_clip_([nn.Parameter(torch.ones(2))]).dtype == torch.int64


def test_what_is_not_finite_shows() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0], [1.0, 0.0]])
    adaptive_grad_clip_(weight)
    assert weight.grad[0].isnan().any()
    assert weight.grad[1].isnan().any()
    torch.testing.assert_close(weight.grad[2], torch.tensor([0.01 * 2**0.5, 0.0]))
    large = nn.Parameter(torch.full((1, 40), 60000.0, dtype=torch.float16))
    large.grad = torch.full((1, 40), 65504.0, dtype=torch.float16)
    adaptive_grad_clip_(large, 0.5)
    torch.testing.assert_close(large.grad, torch.full_like(large, 30000.0))


def test_on_meta_and_with_graphs() -> None:
    weight = nn.Parameter(torch.ones(3, 2, device="meta"))
    weight.grad = torch.ones(3, 2, device="meta")
    assert adaptive_grad_clip_(weight).device.type == "meta"
    weight = nn.Parameter(torch.ones(3, 2))
    (weight.grad,) = torch.autograd.grad(weight.square().sum(), weight, create_graph=True)
    assert adaptive_grad_clip_(weight) == 3


@pytest.mark.untyped
def test_compiles() -> None:
    def clip(parameters: list[Tensor]) -> Tensor:
        return adaptive_grad_clip_(parameters, 0.02, eps=0.1)

    parameters = [a_parameter(shape) for shape in ((5, 3), (4,))]
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    for one, other in zip(copies, parameters, strict=True):
        one.grad = other.grad.clone()
    compiled = torch.compile(clip, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(parameters), clip(copies))
    for one, other in zip(copies, parameters, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def a_model() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 5), nn.Conv2d(2, 3, 2), nn.Linear(5, 1), nn.LayerNorm(1))
    for parameter in model.parameters():
        grad = torch.randn_like(parameter) * torch.rand(
            len(parameter), *[1] * (parameter.dim() - 1)
        )
        parameter.grad = 0.02 * grad
    return model


def sharded_clipping() -> list[Tensor]:
    """The numbers of clipped units and the whole gradients, of FSDP2 and of other placements."""
    mesh = init_device_mesh("cpu", (2,))
    results = []
    for norm_type in (2.0, 1.0, math.inf):
        whole, model = a_model(), a_model()
        fully_shard(model, mesh=mesh)
        for parameter, original in zip(model.parameters(), whole.parameters(), strict=True):
            parameter.grad = distribute_tensor(original.grad, mesh, parameter.placements)
            assert isinstance(parameter.grad, DTensor)
        plain = next(a_model().parameters())  # beside the distributed ones
        parameters = [*model.parameters(), plain]
        results.append(adaptive_grad_clip_(parameters, norm_type=norm_type))
        results += [p.grad.full_tensor() for p in model.parameters()]
        for placement in (Replicate(), Shard(1)):
            weight = next(a_model().parameters())
            parameter = nn.Parameter(distribute_tensor(weight.detach(), mesh, [placement]))
            parameter.grad = distribute_tensor(weight.grad, mesh, [placement])
            results.append(adaptive_grad_clip_(parameter, norm_type=norm_type))
            results.append(parameter.grad.full_tensor())
    return results


def test_distributed_gradients() -> None:
    expected = []
    for norm_type in (2.0, 1.0, math.inf):
        model, weight = a_model(), next(a_model().parameters())
        parameters = [*model.parameters(), copy.deepcopy(weight)]
        parameters[-1].grad = weight.grad.clone()
        expected.append(adaptive_grad_clip_(parameters, norm_type=norm_type))
        assert 3 < expected[-1] < 19
        expected += [p.grad for p in model.parameters()]
        count = adaptive_grad_clip_(weight, norm_type=norm_type)
        assert 0 < count < 5
        expected += 2 * [count, weight.grad]
    for results in processes.run(sharded_clipping, 2):
        for result, value in zip(results, expected, strict=True):
            assert type(result) is Tensor
            torch.testing.assert_close(result, value)


@pytest.mark.untyped
def test_bad_input() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.ones(3, 2)
    for name in ("clip_factor", "eps"):
        for value in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"adaptive_grad_clip_: {name} must be a finite n"):
                adaptive_grad_clip_(weight, **{name: value})
    for value in (0, -2.0, math.nan):
        with pytest.raises(ValueError, match="adaptive_grad_clip_: norm_type must be a number abo"):
            adaptive_grad_clip_(weight, norm_type=value)
    with pytest.raises(TypeError, match="adaptive_grad_clip_: norm_type must be a number"):
        adaptive_grad_clip_(weight, norm_type="fro")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="adaptive_grad_clip_: parameters must be a tensor or an i"):
        adaptive_grad_clip_(1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"_clip_: parameters\[1\] must be a floating-point tensor"):
        adaptive_grad_clip_([weight, ("name", weight)])  # type: ignore[list-item]
    with pytest.raises(
        TypeError, match=r"parameters\[0\] must be a floating-point tensor, got com"
    ):
        adaptive_grad_clip_(torch.ones(2, dtype=torch.complex64))
    sparse = nn.Parameter(torch.ones(3, 2))
    sparse.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(TypeError, match=r"parameters\[0\]\.grad must be a dense tensor"):
        adaptive_grad_clip_(sparse)
    with pytest.raises(TypeError, match="positional"):
        adaptive_grad_clip_(weight, 0.01, 1e-3)  # type: ignore[misc]
    assert (
        adaptive_grad_clip_(weight, np.float32(0.5), eps=np.float64(0.1), norm_type=np.int64(2))
        == 3
    )
    torch.testing.assert_close(weight.grad, torch.full((3, 2), 0.5))


def clipped(weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    weight, grad = weight.detach().clone(), grad.clone()
    weight.grad = grad
    return adaptive_grad_clip_(weight), grad


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(adaptive_grad_clip_, lambda: {"weight": draw(5, 3), "grad": draw(5, 3)}, by=clipped),
    ]
