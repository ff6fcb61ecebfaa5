"""The checks of arguments: what each takes, and the message for what it does not."""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from tilework import _checks, attention, decoding, losses, norms

pytestmark = pytest.mark.untyped
Check = Callable[..., Any]

INTS = (0, 1, -3, 10**20, np.int64(2), np.uint8(3))
NO_INTS = (True, np.True_, 1.0, np.float64(1), np.float32(1), "1", None, [1], torch.tensor(1))
FINITE = (0, -1.5, 1e300, np.float32(0.5), np.float64(-2), np.int32(7))
INFINITE = (math.inf, -math.inf, math.nan, np.float32("inf"), np.float64("nan"))
NO_NUMBERS = (
    True,
    np.False_,
    "1",
    None,
    [1.0],
    1j,
    np.complex64(1),
    Fraction(1),
    torch.tensor(1.0),
)
AN_INT, A_NUMBER = "an int", "a number"


def at_least(minimum: float) -> Check:
    return lambda *args: _checks.at_least(*args, minimum)


def count(*minimum: int) -> Check:
    return lambda *args: _checks.count(*args, *minimum)


# The check; what it takes; values, and what is of another type, with what their messages accept.
NUMBERS: dict[str, tuple[Check, tuple[Any, ...], str, tuple[Any, ...], str, tuple[Any, ...]]] = {
    "number": (_checks.number, (*FINITE, *INFINITE), "", (), A_NUMBER, NO_NUMBERS),
    "finite": (_checks.finite, FINITE, "a finite number", INFINITE, A_NUMBER, NO_NUMBERS),
    "at_least 2": (
        at_least(2),
        (2, 2.0, 1e9, np.float32(2), np.int8(2)),
        "a finite number of at least 2",
        (1, 1.999, -2, np.float32(1.9), *INFINITE),
        A_NUMBER,
        NO_NUMBERS,
    ),
    "positive": (
        _checks.positive,
        (5e-324, 1, np.float32(1e-30)),
        "a finite number above 0",
        (0, -0.0, -1, np.int64(0), *INFINITE),
        A_NUMBER,
        NO_NUMBERS,
    ),
    "fraction": (
        _checks.fraction,
        (0, 0.5, 1, np.float32(1), np.int64(0)),
        "a number from 0 to 1",
        (-1e-9, 1.0000001, 2, np.float32(1.1), *INFINITE),
        A_NUMBER,
        NO_NUMBERS,
    ),
    "open_fraction": (
        _checks.open_fraction,
        (1e-9, 0.5, np.float32(0.5)),
        "a number above 0 and below 1",
        (0, 1, -0.5, np.float64(1), *INFINITE),
        A_NUMBER,
        NO_NUMBERS,
    ),
    "positive_fraction": (
        _checks.positive_fraction,
        (1e-9, 0.5, 1, np.float32(1), np.int64(1)),
        "a number above 0 and at most 1",
        (0, -0.5, 1.0000001, np.float32(0), *INFINITE),
        A_NUMBER,
        NO_NUMBERS,
    ),
    "integer": (_checks.integer, INTS, "", (), AN_INT, NO_INTS),
    "count": (
        count(),
        (1, 2, 10**20, np.int64(1)),
        "an int of at least 1",
        (0, -1, np.int32(0)),
        AN_INT,
        NO_INTS,
    ),
    "count 2": (
        count(2),
        (2, np.uint8(2)),
        "an int of at least 2",
        (1, 0, np.int64(1)),
        AN_INT,
        NO_INTS,
    ),
}


@pytest.mark.parametrize(
    ("check", "accepted", "values", "bad", "types", "wrong"), NUMBERS.values(), ids=NUMBERS
)
def test_numbers(
    check: Check,
    accepted: tuple[Any, ...],
    values: str,
    bad: tuple[Any, ...],
    types: str,
    wrong: tuple[Any, ...],
) -> None:
    for value in accepted:
        check("f", "a", value)
    for error, message, refused in ((ValueError, values, bad), (TypeError, types, wrong)):
        for value in refused:
            expected = f"f: a must be {message}, got {_checks.describe(value)}"
            with pytest.raises(error, match=f"^{re.escape(expected)}$"):
                check("f", "a", value)


def test_a_number_is_one_of_python() -> None:
    for value, kind in ((np.float32(0.5), float), (np.int64(3), int), (0.5, float), (3, int)):
        result = _checks.number("f", "a", value)
        assert type(result) is kind
        assert result == value


def test_an_int_is_one_of_python() -> None:
    for value in (np.int64(3), np.uint8(3), 3):
        result = _checks.integer("f", "a", value)
        assert type(result) is int
        assert result == 3


def test_what_came_is_described() -> None:
    assert _checks.describe(torch.zeros(2, 3, dtype=torch.int8)) == "int8 of shape (2, 3)"
    assert _checks.describe(torch.zeros(())) == "float32 of shape ()"
    assert _checks.describe("sum") == "'sum'"


def test_one_of() -> None:
    _checks.one_of("f", "a", "x", iter(["x", None]))
    _checks.one_of("f", "a", None, ["x", None])
    for value in ("y", "", 0):
        with pytest.raises(ValueError, match=rf"^f: a must be one of 'x', None, got {value!r}$"):
            _checks.one_of("f", "a", value, iter(["x", None]))


def test_fractions_of_a_tensor() -> None:
    good = torch.tensor([0.0, 0.5, 1.0, math.nan])
    assert torch.equal(_checks.fractions("f", "a", good)[:3], good[:3])
    assert _checks.fractions("f", "a", good)[3].isnan()
    assert _checks.fractions("f", "a", torch.zeros(0)).shape == (0,)
    for value in (-0.5, 1.5, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"^f: a must be from 0 to 1 everywhere, got {value}$"):
            _checks.fractions("f", "a", torch.tensor([0.5, value]))

    def batched(value: torch.Tensor) -> torch.Tensor:
        return _checks.fractions("f", "a", value)

    outside = torch.vmap(batched)(torch.tensor([0.5, 1.5, -0.5]))
    assert outside.isnan().tolist() == [False, True, True]


def test_floating() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2):
        _checks.floating("f", "a", torch.zeros(1).to(dtype))
    for value in (torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.complex64), 1.0):
        with pytest.raises(TypeError, match=r"^f: a must be a floating-point tensor, got "):
            _checks.floating("f", "a", value)


def test_values_are_read_where_that_is_free() -> None:
    assert _checks.holds_values(torch.zeros(1))
    assert _checks.holds_values(torch.nn.Parameter(torch.zeros(1)))
    assert not _checks.has_values(torch.zeros(1, device="meta"))
    with FakeTensorMode():
        assert not _checks.has_values(torch.zeros(1))
    assert not _checks.holds_values(torch.nn.Buffer(torch.zeros(1)).as_subclass(Subclass))
    seen = []
    torch.vmap(lambda x: seen.append(_checks.holds_values(x)) or x)(torch.zeros(2))
    torch.func.grad(lambda x: seen.append(_checks.holds_values(x)) or x)(torch.zeros(()))
    assert seen == [False, False]

    def traced(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if _checks.holds_values(x) else x

    assert torch.compile(traced, backend="eager", fullgraph=True)(torch.zeros(1)).item() == 0


class Subclass(torch.Tensor):
    """A tensor that is no plain one."""


def test_shape() -> None:
    _checks.shape("f", "a", torch.zeros(2, 0), [2, 0])
    _checks.shape("f", "a", torch.zeros(()), ())
    for expected in ((3, 2), (2,), (2, 3, 1), ()):
        message = f"f: a must be of shape {expected}, got float32 of shape (2, 3)"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            _checks.shape("f", "a", torch.zeros(2, 3), expected)


def test_constant() -> None:
    trained = torch.zeros(2, requires_grad=True)
    _checks.constant("f", "a", torch.zeros(2), (2,))
    with torch.no_grad():
        _checks.constant("f", "a", trained, (2,))
    with pytest.raises(ValueError, match=r"^f: a must not require a gradient: it is a constant"):
        _checks.constant("f", "a", trained, (2,))
    with pytest.raises(ValueError, match=r"^f: a must be of shape \(3,\)"):
        _checks.constant("f", "a", trained, (3,))
    with pytest.raises(TypeError, match=r"^f: a must be a floating-point tensor"):
        _checks.constant("f", "a", torch.zeros(2, dtype=torch.int64), (2,))


def test_same_device() -> None:
    here, there = torch.zeros(1), torch.zeros(1, device="meta")
    _checks.same_device("f", a=here, b=None, c=here)
    _checks.same_device("f", a=None, b=there)
    for tensors in ({"a": here, "b": None, "c": there}, {"b": None, "a": here, "c": there}):
        with pytest.raises(ValueError, match=r"^f: c must lie on the device of a, cpu, got meta$"):
            _checks.same_device("f", **tensors)


def test_sizes() -> None:
    for value, expected in (
        (3, (3,)),
        (0, (0,)),
        ([2, 0], (2, 0)),
        (torch.Size([4, 5]), (4, 5)),
        (np.int64(3), (3,)),
        ((np.int32(2), 3), (2, 3)),
    ):
        found = _checks.sizes("f", "a", value)
        assert found == expected
        assert {type(size) for size in found} == {int}
    accepted = "^f: a must be an int or a non-empty sequence of ints, each at least 0, got "
    for value in ((), [], -1, (2, -1)):
        with pytest.raises(ValueError, match=accepted):
            _checks.sizes("f", "a", value)
    for value in (2.0, "12", None, (2, None), (1.5,), np.float32(2), True, (2, True)):
        with pytest.raises(TypeError, match=accepted):
            _checks.sizes("f", "a", value)


INPUT, TARGET = torch.ones(2, 3, 8), torch.tensor([[1, 0, 4], [3, -1, 2]])
HEAD, SCORES = torch.ones(5, 8), torch.arange(16.0).view(1, 1, 4, 4)
CALLS: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any]]] = {
    "head": (
        lambda **options: losses.linear_cross_entropy(INPUT, HEAD, TARGET, **options),
        {"ignore_index": -1, "label_smoothing": 0.5, "z_loss": 0.25, "shift": 1, "softcap": 4.0},
    ),
    "loss": (
        lambda **options: losses.comp_sum_loss(INPUT.mT, TARGET, **options),
        {"ignore_index": -1, "tau": 1.5},
    ),
    "norm": (
        lambda **options: norms.rms_norm(INPUT, weight=HEAD[0], **options),
        {"normalized_shape": 8, "eps": 0.5, "weight_offset": 1.0},
    ),
    "kernel": (
        lambda **options: norms.rms_norm(INPUT, implementation="triton", **options),
        {"normalized_shape": 8, "eps": 0.5},
    ),
    "layout": (
        lambda **options: attention.BlockLayout.from_scores_topk(SCORES, **options).to_dense(),
        {"k": 2, "block_size": 16, "num_sink_blocks": 1},
    ),
    "filter": (
        lambda **options: decoding.typical_p(INPUT[0], **options),
        {"mass": 0.5, "min_tokens_to_keep": 2},
    ),
}


@pytest.mark.parametrize(("call", "options"), CALLS.values(), ids=CALLS)
def test_scalars_of_numpy_are_the_numbers_they_stand_for(
    call: Callable[..., torch.Tensor], options: dict[str, Any]
) -> None:
    kinds = {int: np.int64, float: np.float32}
    scalars = {name: kinds[type(value)](value) for name, value in options.items()}
    assert torch.equal(call(**options), call(**scalars))
