"""What a rule computes on: flat pieces, joined or cut."""

import pytest
import torch

from tilework.optim import Lion
from tilework.optim._optimizer import updates
from tilework.optim._optimizer.updates import Part


def part(parameter: torch.Tensor, position: int = 0) -> Part:
    return Part(
        parameter, torch.randn_like(parameter), {"m": torch.zeros_like(parameter)}, None, position
    )


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)])
def test_dense_tensors_are_flat_however_they_lie(order: tuple[int, ...]) -> None:
    """Such as those in channels_last, whose elements keep the order of memory."""
    inverse = [order.index(dim) for dim in range(4)]
    shape = (3, 4, 5, 2)
    parameter = torch.randn([shape[dim] for dim in order]).permute(inverse)
    one = part(parameter)
    flat = updates.flat(one)
    assert flat.parameter.dim() == 1
    assert flat.parameter.data_ptr() == parameter.data_ptr()
    assert flat.states["m"].data_ptr() == one.states["m"].data_ptr()
    joined = updates.flat(Part(parameter, parameter, {"m": parameter}, None, 0))
    assert torch.equal(joined.parameter, joined.gradient)


def test_what_is_not_dense_stays_as_it_is() -> None:
    parameter = torch.randn(3, 8)[:, ::2]
    assert updates.flat(part(parameter)).parameter.shape == (3, 4)
    transposed = part(torch.randn(3, 4))._replace(states={"m": torch.zeros(4, 3).mT})
    assert updates.flat(transposed).parameter.shape == (3, 4)


def test_lazily_conjugated_parameters_are_refused() -> None:
    """Their real numbers would be a copy, and the step lost; such gradients are read."""
    parameter = torch.randn(3, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="view_as_real"):
        updates.flat(part(parameter.conj()))
    flat = updates.flat(part(parameter)._replace(gradient=parameter.conj()))
    assert torch.equal(flat.gradient, torch.view_as_real(parameter.conj_physical()).reshape(-1))


def test_batches_hold_no_more_than_they_may() -> None:
    parts = [part(torch.randn(size)) for size in (3, 3, 3, 4, 1)]
    batches = list(updates.batches(parts, 6))
    sizes = [[one.parameter.numel() for one in batch] for batch in batches]
    assert sizes == [[3, 3], [3], [4, 1]]


def test_places_are_row_major() -> None:
    assert torch.equal(updates.places_of(torch.zeros(2, 3, 4)).reshape(-1), torch.arange(24))
    assert updates.places_of(torch.zeros(())).item() == 0


def test_each_device_and_dtype_is_updated_apart() -> None:
    parameters = [
        torch.nn.Parameter(torch.ones(3)),
        torch.nn.Parameter(torch.ones(3, device="meta")),
        torch.nn.Parameter(torch.ones(3, dtype=torch.float64)),
    ]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    Lion(parameters, lr=0.25).step()
    for parameter in (parameters[0], parameters[2]):
        assert torch.equal(parameter, torch.full_like(parameter, 0.75))
