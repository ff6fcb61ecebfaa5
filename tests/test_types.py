"""The types that users' checkers see."""

import inspect
import types
import typing
from pathlib import Path

import pytest

from tilework import catalog

USES = Path(__file__).parent / "uses.py"
UNIONS = [
    entry.object
    for entry in catalog.entries()
    if inspect.isfunction(entry.object)
    and isinstance(inspect.signature(entry.object).return_annotation, types.UnionType)
]


@pytest.mark.untyped  # the type checker wraps overloads, which are then no longer found
@pytest.mark.parametrize("function", UNIONS, ids=lambda function: function.__name__)
def test_results_that_depend_on_an_argument_have_overloads(function: types.FunctionType) -> None:
    """With the parameters of the function, in its order and with its defaults."""
    overloads = typing.get_overloads(function)
    assert len(overloads) >= 2
    expected = inspect.signature(function).parameters
    differ = set()
    for overload in overloads:
        found = inspect.signature(overload).parameters
        assert list(found) == list(expected)
        assert all(found[name].kind is expected[name].kind for name in expected)
        differ |= {name for name in expected if found[name].default != expected[name].default}
    assert len(differ) == 1
    assert f"assert_type({function.__name__}(" in USES.read_text()


def test_results_are_found() -> None:
    assert {"rms_norm", "block_sparse_attention"} <= {function.__name__ for function in UNIONS}


def test_a_checker_passes() -> None:
    api = pytest.importorskip("mypy.api")
    report, errors, status = api.run(["--strict", str(USES)])
    assert status == 0, report + errors
