"""How operators are defined by names."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tilework import _operators


class Arguments(NamedTuple):
    """Of ``gain * input**3`` and a count that has no gradient."""

    input: Tensor
    gain: Tensor | None
    other: Tensor
    power: int
    implementation: str


class Results(NamedTuple):
    value: Tensor
    size: Tensor


def toy_reference(given: Arguments) -> Results:
    value = given.input**given.power * given.other
    if given.gain is not None:
        value = value * given.gain
    return Results(value, given.input.detach().abs())


def toy_backward(
    given: Arguments, results: Results, grads: Results, needed: frozenset[str]
) -> dict[str, Tensor]:
    assert results == (None, None)
    assert grads.size is None
    assert grads.value is not None
    outer = grads.value * given.other
    found = {}
    if "input" in needed:
        scale = 1 if given.gain is None else given.gain
        found["input"] = outer * given.power * given.input ** (given.power - 1) * scale
    # What nobody needs may be there too.
    found["gain"] = outer * given.input**given.power if "gain" in needed else outer.new_empty(0)
    return found


rooms = ModuleType("toy_rooms.direct")
rooms.forward, rooms.backward = toy_reference, toy_backward  # type: ignore[attr-defined]
sys.modules["toy_rooms"] = ModuleType("toy_rooms")
sys.modules["toy_rooms.direct"] = rooms
toy = _operators.define_pair(
    "toy",
    Arguments,
    Results,
    lambda given: Results(torch.empty_like(given.input), torch.empty_like(given.input)),
    reference=toy_reference,
    rooms="toy_rooms",
    differentiable=("input", "gain"),
    saved=("input", "gain", "other"),
    constant=("size",),
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"saved": ("input", "gian")}, r"saved must .* other, value, size, got 'gian'"),
        ({"saved": ("input", "power")}, r"saved must .*, got 'power'"),
        ({"constant": ("input",)}, r"constant must name some of value, size, got 'input'"),
        ({"differentiable": ("power",)}, r"differentiable \(all saved\) must .*, got 'power'"),
        ({"differentiable": ("input", "other")}, r"differentiable .* of input, gain, got 'other'"),
    ],
)
def test_names_that_the_tuples_do_not_have(change: dict[str, Any], message: str) -> None:
    names = {"differentiable": ("input",), "saved": ("input", "gain")} | change
    with pytest.raises(ValueError, match=f"^toy_misnamed: {message}$"):
        _operators.define_pair(
            "toy_misnamed",
            Arguments,
            Results,
            toy_reference,
            reference=toy_reference,
            rooms="toy_rooms",
            **names,
        )


def test_attached_results_are_saved() -> None:
    with pytest.raises(
        ValueError, match=r"^toy_loose: attached .* must name some of size, got 'value"
    ):
        _operators.define(
            "toy_loose",
            Arguments,
            Results,
            toy_reference,
            toy_reference,
            derivative=lambda *_: {},
            saved=("size",),
            attached=("value",),
        )


def test_an_annotation_that_no_schema_has() -> None:
    class Sizes(NamedTuple):
        input: Tensor
        sizes: tuple[int, ...]

    with pytest.raises(TypeError, match=r"^toy_sizes: sizes must be .*, got tuple\[int, \.\.\.\]$"):
        _operators.define(
            "toy_sizes",
            Sizes,
            Results,
            lambda given: Results(given.input, given.input),
            lambda given: Results(given.input, given.input),
            derivative=lambda *_: {},
        )


def toy_arguments(gain: bool = True, implementation: str = "direct") -> Arguments:
    input, scale = torch.randn(2, 5, dtype=torch.float64).unbind()
    return Arguments(
        input.requires_grad_(),
        scale.requires_grad_() if gain else None,
        torch.randn(5, dtype=torch.float64),
        3,
        implementation,
    )


@pytest.mark.untyped
@pytest.mark.parametrize("gain", [False, True])
def test_pair_differentiates_by_names(gain: bool) -> None:
    given = toy_arguments(gain)
    leaves = [given.input, given.gain] if gain else [given.input]
    names = ["input", "gain"][: len(leaves)]

    def function(*values: Tensor) -> Tensor:
        return toy(given._replace(**dict(zip(names, values, strict=True)))).value

    assert not toy(given).size.requires_grad
    torch.testing.assert_close(toy(given), toy_reference(given))
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)
    for one in leaves:
        one.requires_grad_(one is not given.input)
        if any(leaf.requires_grad for leaf in leaves):
            assert torch.autograd.gradcheck(function, leaves)
    arguments = tuple(given)
    torch.library.opcheck(torch.ops.tilework.toy.default, arguments)
    upstream = torch.randn(5, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.tilework.toy_backward.default,
        (*arguments[:3], upstream, [True, gain], *arguments[3:]),
    )


def test_the_reference_runs_where_it_is_named_wherever_that_stands() -> None:
    class Turned(NamedTuple):
        implementation: str
        input: Tensor

    def reference(given: Turned) -> Results:
        return Results(2 * given.input, given.input)

    twice = _operators.define_pair(
        "toy_turned",
        Turned,
        Results,
        reference,
        reference=reference,
        rooms="toy_rooms",  # has none of this name
        differentiable=("input",),
        saved=("input",),
        constant=("size",),
    )
    assert torch.equal(twice(Turned("reference", torch.ones(3))).value, torch.full((3,), 2.0))


@pytest.mark.untyped
def test_pair_under_transforms() -> None:
    given = toy_arguments()
    expected = torch.autograd.grad(toy_reference(given).value.sum(), given.input)[0]

    def total(input: Tensor) -> Tensor:
        return toy(given._replace(input=input)).value.sum()

    torch.testing.assert_close(torch.func.grad(total)(given.input), expected)
    batch = torch.stack((given.input, 2 * given.input)).detach()
    looped = torch.stack([torch.func.grad(total)(row) for row in batch])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(batch), looped)
    with pytest.raises(ValueError, match="vmap over an empty dimension"):
        torch.func.vmap(total)(batch[:0])
    hessian = torch.func.hessian(total)(given.input)
    torch.testing.assert_close(hessian, torch.func.hessian(total_of_reference(given))(given.input))
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(given.input), given.input)[0], expected)


def total_of_reference(given: Arguments) -> Callable[[Tensor], Tensor]:
    return lambda input: toy_reference(given._replace(input=input)).value.sum()


@pytest.mark.untyped
def test_schema_has_the_names_and_types_of_the_arguments() -> None:
    assert str(torch.ops.tilework.toy.default._schema) == (
        "tilework::toy(Tensor input, Tensor? gain, Tensor other, SymInt power, str implementation)"
        " -> (Tensor, Tensor)"
    )
    assert str(torch.ops.tilework.toy_backward.default._schema) == (
        "tilework::toy_backward(Tensor input, Tensor? gain, Tensor other, Tensor? grad_value, "
        "bool[] needed, SymInt power, str implementation) -> (Tensor, Tensor)"
    )


@pytest.mark.untyped
def test_a_derivative_that_refuses() -> None:
    class One(NamedTuple):
        input: Tensor

    def refuse(*_: object) -> dict[str, Tensor]:
        raise RuntimeError("it has no gradients")

    double = _operators.define(
        "toy_double",
        One,
        One,
        lambda given: One(2 * given.input),
        lambda given: One(torch.empty_like(given.input)),
        derivative=refuse,
    )
    result = double(One(torch.ones(3, requires_grad=True)))
    assert result == One(result.input)
    with pytest.raises(RuntimeError, match="it has no gradients"):
        result.input.sum().backward()
    torch.testing.assert_close(
        torch.func.vmap(lambda row: double(One(row)).input)(torch.ones(2, 3)),
        torch.full((2, 3), 2.0),
    )
