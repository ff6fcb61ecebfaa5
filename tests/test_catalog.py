"""The catalogue, and what every public name must have."""

import doctest
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tilework
from tilework import catalog
from tilework._options import Options

ENTRIES = catalog.entries()
TWINS = [entry for entry in ENTRIES if catalog.function_of(entry.object)]
TESTS = Path(__file__).parent


def public() -> dict[str, Any]:
    return {
        f"tilework.{family}.{name}": getattr(getattr(tilework, family), name)
        for family in tilework.FAMILIES
        for name in importlib.import_module(f"tilework.{family}").__all__
    }


def test_every_public_name_has_one_entry() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    constants = {name for name, value in public().items() if not callable(value)}
    assert set(names) == public().keys() - constants
    kinds = {entry.object for entry in ENTRIES}
    assert all(type(public()[name]) in kinds for name in constants)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_is_complete(entry: catalog.Entry) -> None:
    assert getattr(getattr(tilework, entry.family), entry.object.__name__) is entry.object
    assert (entry.paper is None) != (entry.reason is None)
    assert entry.summary.endswith(".")
    documentation = inspect.getdoc(entry.object)
    assert documentation is not None
    assert doctest.DocTestParser().get_examples(documentation), "no example"
    sections = ["Args:", "Returns:", "Raises:", "Example:", "Deviations:", "Reference:"]
    places = [documentation.find(f"\n{section}") for section in sections]
    found = [place for place in places if place >= 0]
    assert found == sorted(found), "sections out of order"
    required = {"Example:"} if entry in TWINS else {"Args:", "Example:", "Reference:"}
    if inspect.isfunction(entry.object):
        required |= {"Returns:"}
    if entry not in TWINS and not (
        inspect.isclass(entry.object) and issubclass(entry.object, tuple)
    ):
        required |= {"Raises:"}
    missing = [s for s, place in zip(sections, places, strict=True) if place < 0 and s in required]
    assert not missing, f"no section {missing}"


def options(callable_: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that are not tensors."""
    return {
        name: parameter.replace(kind=parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(callable_).parameters.items()
        if "Tensor" not in str(parameter.annotation)
    }


@pytest.mark.parametrize("entry", TWINS, ids=lambda entry: entry.name)
def test_every_twin_has_the_options_of_its_function(entry: catalog.Entry) -> None:
    function = catalog.function_of(entry.object)
    assert function is not None
    assert issubclass(entry.object, Options)
    expected, found = options(function), options(entry.object)
    own = [name for name, parameter in found.items() if name not in expected]
    positional = inspect.signature(entry.object).parameters
    assert all(positional[name].kind is not inspect.Parameter.KEYWORD_ONLY for name in own)
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_has_a_test_file(entry: catalog.Entry) -> None:
    module = entry.object.__module__.rpartition(".")[2]
    family = TESTS / entry.family
    files = [*family.rglob(f"test_{module}.py"), *(family / module).glob("test_*.py")]
    assert any(entry.object.__name__ in file.read_text() for file in files), (
        f"no test of {entry.name} in {family}"
    )


COMMON = {
    "device": None,
    "dtype": None,
    "enable_gqa": False,
    "gradient_filter": None,
    "group": None,
    "ignore_index": -100,
    "implementation": None,
    "is_causal": False,
    "label_smoothing": 0.0,
    "linear_bias": None,
    "mask": None,
    "reduction": "mean",
    "return_lse": False,
    "shift": 0,
    "softcap": None,
    "temperature": 1.0,
    "token_weight": None,
    "vocab_parallel": None,
}
"""Options that mean the same everywhere, and are what torch has where torch has them."""


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_common_options_have_the_same_defaults(entry: catalog.Entry) -> None:
    parameters = inspect.signature(entry.object).parameters
    common = COMMON.keys() & parameters.keys()
    found = {name: parameters[name].default for name in common}
    assert found == {name: COMMON[name] for name in common}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_years_are_those_of_the_first_version(entry: catalog.Entry) -> None:
    """Which the identifiers of arXiv begin with."""
    if entry.paper is not None and entry.paper.arxiv is not None:
        assert entry.paper.year == 2000 + int(entry.paper.arxiv[:2])


def test_find() -> None:
    entry = catalog.find("linear_cross_entropy")
    assert entry is catalog.find("losses.linear_cross_entropy")
    assert entry is catalog.find("tilework.losses.linear_cross_entropy")
    assert entry.paper is not None
    assert entry.paper.url == "https://arxiv.org/abs/2411.09009"
    with pytest.raises(KeyError, match="cross_entropy"):
        catalog.find("cross_entropy")


def test_decorators_return_what_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: list[catalog.Entry] = []
    monkeypatch.setattr(catalog, "_registry", registry)

    def function() -> None:
        """Do nothing."""

    assert catalog.implements("A title", year=2000)(function) is function
    assert catalog.without_paper("a helper")(function) is function
    first, second = registry
    assert first.paper == catalog.Paper("A title", 2000)
    assert first.paper.url is None
    assert (second.paper, second.reason) == (None, "a helper")
