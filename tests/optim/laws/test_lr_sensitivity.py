"""Learning-rate sensitivity, against loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilework.optim import lr_sensitivity

import samples
from calls import Call, draw
from helpers import FLOATING, dtype_name

# Of what is above 1e-300, differences do not underflow.
LOSSES = st.lists(
    st.one_of(
        st.floats(-5, 20).filter(lambda loss: loss == 0 or abs(loss) > 1e-300),
        st.just(math.nan),
        st.just(math.inf),
    ),
    min_size=1,
    max_size=9,
)


def by_loops(losses: list[float], initial_loss: float) -> float:
    clipped = []
    for loss in losses:
        diverged = math.isnan(loss) or loss == math.inf
        clipped.append(initial_loss if diverged or loss > initial_loss else loss)
    return math.fsum(clipped) / len(clipped) - min(clipped)


@given(LOSSES, st.floats(1, 10), st.randoms())
def test_equals_loops(losses: list[float], initial_loss: float, random) -> None:
    tensor = torch.tensor(losses, dtype=torch.float64)
    actual = lr_sensitivity(tensor, initial_loss=initial_loss)
    assert actual.item() == pytest.approx(by_loops(losses, initial_loss), abs=1e-12)
    assert actual >= 0
    clipped = {min(loss, initial_loss) if loss < math.inf else initial_loss for loss in losses}
    assert (actual == 0) == (len(clipped) == 1)
    shuffled = random.sample(losses, len(losses))
    moved = lr_sensitivity(torch.tensor(shuffled, dtype=torch.float64), initial_loss=initial_loss)
    torch.testing.assert_close(moved, actual)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_shapes_and_dtypes(dtype: torch.dtype) -> None:
    losses = (3 * torch.rand(2, 3, 7)).to(dtype)
    losses[0, 1, 2] = torch.nan
    before = losses.clone()
    actual = lr_sensitivity(losses, initial_loss=2.0)
    assert actual.dtype == dtype
    torch.testing.assert_close(losses, before, rtol=0, atol=0, equal_nan=True)
    expected = [[by_loops(row.tolist(), 2.0) for row in rows] for rows in losses.double()]
    truth = torch.tensor(expected, dtype=torch.float64)
    loops = 4 * torch.finfo(torch.float64).eps  # what the loops lose when they subtract
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), truth, rtol=2 * eps, atol=loops)
    assert lr_sensitivity(losses[:, :0], initial_loss=2.0).shape == (2, 0)


def test_numbers() -> None:
    actual = lr_sensitivity([3.0, 2.0, math.inf], initial_loss=5.0)
    assert actual.shape == ()
    assert actual.dtype == torch.get_default_dtype()
    assert actual.item() == pytest.approx(4 / 3)
    assert lr_sensitivity([3.0, -math.inf], initial_loss=5.0).isnan()


@pytest.mark.untyped
def test_transforms() -> None:
    losses = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: lr_sensitivity(values, initial_loss=0.7), losses)
    compiled = torch.compile(lr_sensitivity, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = lr_sensitivity(losses, initial_loss=0.7)
    torch.testing.assert_close(compiled(losses, initial_loss=0.7), expected)
    batched = torch.func.vmap(lambda row: lr_sensitivity(row, initial_loss=0.7))(losses)
    torch.testing.assert_close(batched, expected)


@pytest.mark.untyped
def test_bad_input() -> None:
    for losses in (torch.zeros(()), torch.zeros(3, 0), []):
        with pytest.raises(ValueError, match="lr_sensitivity: losses must be of shape"):
            lr_sensitivity(losses, initial_loss=1.0)
    with pytest.raises(TypeError, match="lr_sensitivity: losses must be a floating-point tensor"):
        lr_sensitivity(torch.zeros(3).int(), initial_loss=1.0)
    with pytest.raises(TypeError, match="lr_sensitivity: losses must be a number, got 'a'"):
        lr_sensitivity(["a"], initial_loss=1.0)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="lr_sensitivity: losses must be a tensor or an iterable"):
        lr_sensitivity(1.0, initial_loss=1.0)  # type: ignore[arg-type]
    for initial_loss in (math.nan, math.inf):
        with pytest.raises(ValueError, match="lr_sensitivity: initial_loss must be a finite numb"):
            lr_sensitivity([1.0], initial_loss=initial_loss)
    with pytest.raises(TypeError, match="lr_sensitivity: initial_loss must be a number"):
        lr_sensitivity([1.0], initial_loss="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="positional"):
        lr_sensitivity([1.0], 1.0)  # type: ignore[misc]


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            lr_sensitivity,
            lambda: {"losses": draw(5, 4) + 3},
            options=({"initial_loss": 10.0},),
        ),
    ]
