"""Steps in the backward pass: what does not depend on the optimizer."""

import pytest
import torch

from tilework.optim import Lion, step_in_backward

from optim.samples import draw_gradients


def test_one_gradient_is_stored_at_a_time() -> None:
    parameters = [torch.nn.Parameter(torch.randn(3)) for _ in range(5)]
    stored = []

    def watch(parameter: torch.Tensor) -> None:
        stored.append(sum(p.grad is not None for p in parameters))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(watch)
    step_in_backward(Lion(parameters))
    value = torch.ones(3)
    for parameter in parameters:
        value = value * parameter
    value.sum().backward()
    assert stored == [1] * 5


def test_schedulers_keep_working() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = Lion([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    step_in_backward(optimizer)
    for expected in (-1.0, -1.5, -1.75):
        parameter.sum().backward()
        optimizer.step()
        scheduler.step()
        assert torch.equal(parameter, torch.full((3,), expected))


def test_a_closure_is_still_called() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = Lion([parameter], lr=1.0)
    step_in_backward(optimizer)

    def closure() -> torch.Tensor:
        loss = parameter.sum()
        loss.backward()
        return loss.detach()

    assert optimizer.step(closure) == 0
    assert torch.equal(parameter, torch.full((3,), -1.0))


def test_frozen_parameters_have_no_steps() -> None:
    frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    free = torch.nn.Parameter(torch.zeros(3))
    handle = step_in_backward(Lion([frozen, free], lr=1.0))
    (free + frozen).sum().backward()
    assert torch.equal(frozen, torch.zeros(3))
    assert torch.equal(free, torch.full((3,), -1.0))
    handle.remove()
    draw_gradients([free])
    assert free.grad is not None


@pytest.mark.untyped
def test_bad_input() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(TypeError, match="step_in_backward: optimizer must be an optimizer of tile"):
        step_in_backward(torch.optim.SGD([parameter]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step_in_backward: accumulate must be an int of at least"):
        step_in_backward(Lion([parameter]), accumulate=0)
    optimizer = Lion([parameter])
    step_in_backward(optimizer)
    with pytest.raises(ValueError, match="optimizer must not step in the backward pass already"):
        step_in_backward(optimizer)
