"""``tilework list`` and ``tilework show``: the public names, their papers and implementations."""

import contextlib
import difflib
import inspect
import re
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tilework import _implementations, catalog
from tilework.bench import doctor


def names(entries: list[catalog.Entry]) -> Table:
    """A table of public names, what they are for, and the papers that they implement."""
    result = Table()
    # A name that is cut off is of no use; all else may be folded.
    result.add_column("name", no_wrap=True, min_width=max(len(_short(one)) for one in entries))
    result.add_column("what it is for, and its paper", overflow="fold")
    for entry in entries:
        about = Text.assemble(_plain(entry.summary), "\n", (_paper(entry), "dim"))
        result.add_row(_short(entry), about)
    return result


def _short(entry: catalog.Entry) -> str:
    """The name as ``tilework show`` takes it."""
    return entry.name.removeprefix("tilework.")


def _plain(text: str) -> str:
    """Without the markup of the docs."""
    return re.sub(r"(?::\w+(?::\w+)?:)?`+~?([^`]+)`+", r"\1", text)


def _paper(entry: catalog.Entry) -> str:
    if entry.paper is None:
        return f"no paper: {entry.reason}"
    arxiv = entry.paper.arxiv and f"arXiv {entry.paper.arxiv}"
    return ", ".join(filter(None, (entry.paper.title, str(entry.paper.year), arxiv)))


def find(name: str) -> tuple[catalog.Entry, str | None]:
    """The entry of a public name, and the name of its attribute if that is what is named.

    Raises:
        KeyError: As of :func:`tilework.catalog.find`.
    """
    try:
        return catalog.find(name), None
    except KeyError:
        owner, _, attribute = name.rpartition(".")
        with contextlib.suppress(KeyError):
            entry = catalog.find(owner)
            public = inspect.isclass(entry.object) and not attribute.startswith("_")
            if public and hasattr(entry.object, attribute):
                return entry, attribute
        raise


def close_matches(name: str) -> list[str]:
    """The public names that look like this one."""
    by_last_part = {
        entry.name.rpartition(".")[2].lower(): entry.name for entry in catalog.entries()
    }
    last = name.rpartition(".")[2].lower()
    return [
        by_last_part[match] for match in difflib.get_close_matches(last, by_last_part, cutoff=0.5)
    ]


def describe(entry: catalog.Entry, attribute: str | None = None) -> Group:
    """The signature, docstring, paper and implementations of a public name, or of its attribute."""
    object_ = entry.object if attribute is None else getattr(entry.object, attribute)
    name = ".".join(filter(None, (entry.name, attribute)))
    parts: list[RenderableType] = [
        Text(_signature(name, object_), style="bold"),
        "",
        Text(inspect.getdoc(object_) or ""),
        "",
        Text(_source(entry)),
    ]
    operator = _implementations.find(entry.name)
    if operator is not None:
        parts += ["", doctor.implementations(operator)]
    return Group(*parts)


def _source(entry: catalog.Entry) -> str:
    if entry.paper is None:
        return f"No paper: {entry.reason}"
    parts = [entry.paper.title, str(entry.paper.year), entry.paper.url]
    return "Paper: " + ", ".join(part for part in parts if part)


def _signature(name: str, object_: Any) -> str:
    """The signature with one parameter on a line."""
    try:
        signature = inspect.signature(object_)
    except TypeError:  # a property
        return name
    lines: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in lines:
            lines.append("*")
        lines.append(str(parameter))
    body = "".join(f"    {line},\n" for line in lines)
    if inspect.isclass(object_) or signature.return_annotation is signature.empty:
        return f"{name}(\n{body})"
    return f"{name}(\n{body}) -> {inspect.formatannotation(signature.return_annotation)}"
