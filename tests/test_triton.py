"""Tuned tables: where an entry stands, what takes its place, and the line to paste."""

from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from tilework import _triton
from tilework._triton import Place, Tuned


class Tile(NamedTuple):
    rows: int
    num_warps: int


PLAIN = Tuned(
    {"sm_80": Tile(1, 1), "sm_90 float32": Tile(2, 1), "float32": Tile(3, 1)}, otherwise="sm_80"
)
BY_SIZE = Tuned(
    {
        "sm_80": {64: Tile(1, 1), 256: Tile(2, 1)},
        "float32": {256: Tile(3, 1)},
        "interpreter": Tile(4, 1),
    },
    otherwise="sm_80",
)


@pytest.mark.parametrize(
    ("arch", "dtype", "rows"),
    [
        ("sm_80", torch.bfloat16, 1),
        ("sm_80", torch.float16, 1),
        ("sm_90", torch.bfloat16, 1),  # of those without an entry
        ("sm_90", None, 1),
        ("sm_90", torch.float32, 2),
        ("sm_80", torch.float32, 3),
        ("interpreter", torch.float32, 3),
        ("interpreter", torch.bfloat16, 1),
    ],
)
def test_an_entry_is_that_of_architecture_and_dtype(
    arch: str, dtype: torch.dtype | None, rows: int
) -> None:
    assert PLAIN.choose(arch, dtype).rows == rows


@pytest.mark.parametrize(
    ("arch", "dtype", "size", "rows"),
    [
        ("sm_80", torch.bfloat16, 64, 1),
        ("sm_80", torch.bfloat16, 65, 2),
        ("sm_100", torch.bfloat16, 256, 2),
        ("sm_100", torch.float32, 1, 3),
        ("interpreter", torch.float32, 1000, 4),
        ("interpreter", torch.bfloat16, 1, 4),
    ],
)
def test_an_entry_is_for_sizes_up_to_its_own(
    arch: str, dtype: torch.dtype, size: int, rows: int
) -> None:
    assert BY_SIZE.choose(arch, dtype, size).rows == rows


def test_a_table_without_an_entry_says_which_one() -> None:
    table = Tuned({"sm_80": Tile(1, 1)}, otherwise="sm_80")
    message = "float32 on sm_90: the table must have 'sm_90 float32' or 'float32', it has 'sm_80'"
    with pytest.raises(LookupError, match=message):
        table.choose("sm_90", torch.float32)


def test_a_table_is_made_from_another() -> None:
    other = PLAIN | {"sm_90": Tile(5, 1)}
    assert other.choose("sm_90", torch.bfloat16).rows == 5
    assert other.choose("sm_100", torch.bfloat16).rows == 1
    assert PLAIN.choose("sm_90", torch.bfloat16).rows == 1
    with other.override(Tile(6, 1)):
        assert PLAIN.choose("sm_90").rows == 1


def test_an_override_ends_with_its_context() -> None:
    with BY_SIZE.override(Tile(7, 1)):
        with BY_SIZE.override(Tile(8, 1)):
            assert BY_SIZE.choose("sm_80", torch.float32, 3).rows == 8
        with pytest.raises(ValueError, match="inside"), BY_SIZE.override(Tile(9, 1)):
            raise ValueError("inside")
        assert BY_SIZE.choose("sm_80", torch.bfloat16, 300).rows == 7
    assert BY_SIZE.choose("sm_80", torch.bfloat16, 3).rows == 1


def test_what_a_table_is_asked_for_is_noted() -> None:
    with BY_SIZE.asked() as places, BY_SIZE.override(Tile(7, 1)):
        BY_SIZE.choose("sm_90", torch.float32, 3)
        BY_SIZE.choose("sm_90")
    BY_SIZE.choose("sm_100")
    assert places == [Place("sm_90", torch.float32, 3), Place("sm_90", None, 0)]


@pytest.mark.parametrize(
    ("table", "place", "line"),
    [
        (PLAIN, Place("sm_90"), '"sm_90": Tile(rows=9, num_warps=4),'),
        (PLAIN, Place("sm_80", torch.float32), '"sm_80 float32": Tile(rows=9, num_warps=4),'),
        (
            BY_SIZE,
            Place("sm_90", torch.bfloat16, 64),
            '"sm_90": {64: Tile(rows=9, num_warps=4), 256: Tile(rows=2, num_warps=1)},',
        ),
        (
            BY_SIZE,
            Place("sm_90", torch.float32, 32),
            '"sm_90 float32": {32: Tile(rows=9, num_warps=4), 256: Tile(rows=3, num_warps=1)},',
        ),
        (
            BY_SIZE,
            Place("interpreter", torch.float32, 3),
            '"interpreter": Tile(rows=9, num_warps=4),',
        ),
    ],
)
def test_the_line_makes_the_table_that_has_the_entry(
    table: Tuned[Tile], place: Place, line: str
) -> None:
    assert table.line(place, Tile(9, 4)) == line
    pasted = table | eval(f"{{{line}}}")
    assert pasted.choose(*place) == Tile(9, 4)
    # Other places keep what they have.
    assert pasted.choose(place.arch, place.dtype, 200) == (
        Tile(9, 4)
        if table is PLAIN or place.arch == "interpreter"
        else table.choose(place.arch, place.dtype, 200)
    )


@triton.jit
def elementary_kernel(input_ptr, output_ptr, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(output_ptr + places, FUNCTION(tl.load(input_ptr + places)))


@pytest.mark.untyped
@pytest.mark.skipif(not _triton.INTERPRETED, reason="on the CPU")
@pytest.mark.parametrize(
    ("function", "exact", "lowest"),
    [
        (_triton.tanh, torch.tanh, -20.0),
        (_triton.expm1, torch.expm1, -20.0),
        (_triton.log1p, torch.log1p, -0.999),
    ],
    ids=["tanh", "expm1", "log1p"],
)
def test_elementary_functions(function: Any, exact: Any, lowest: float) -> None:
    """In units of the result, however small it is."""
    sizes = torch.logspace(-9, 1.3, 512)
    input = torch.cat((sizes, -sizes, torch.linspace(-0.6, 0.6, 1024))).clamp(min=lowest)
    output = torch.empty_like(input)
    elementary_kernel[(1,)](input, output, FUNCTION=function, SIZE=len(input))
    torch.testing.assert_close(output.double(), exact(input.double()), rtol=5e-7, atol=0)
