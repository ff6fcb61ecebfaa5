"""``tilework list`` and ``tilework show``: the public names, their papers and implementations."""

import difflib
import inspect

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tilework import _implementations, catalog
from tilework.bench import doctor


def names(entries: list[catalog.Entry]) -> Table:
    """A table of public names with the papers that they implement."""
    result = Table("name", "paper", "year", "arXiv")
    for entry in entries:
        if entry.paper is None:
            result.add_row(entry.name, Text(f"no paper: {entry.reason}", style="dim"), "", "")
        else:
            paper = entry.paper
            result.add_row(entry.name, paper.title, str(paper.year), paper.arxiv or "")
    return result


def close_matches(name: str) -> list[str]:
    """The public names that look like this one."""
    by_last_part = {
        entry.name.rpartition(".")[2].lower(): entry.name for entry in catalog.entries()
    }
    last = name.rpartition(".")[2].lower()
    return [
        by_last_part[match] for match in difflib.get_close_matches(last, by_last_part, cutoff=0.5)
    ]


def describe(entry: catalog.Entry) -> Group:
    """The signature, docstring, paper and implementations of one public name."""
    parts: list[RenderableType] = [
        Text(_signature(entry), style="bold"),
        "",
        Text(inspect.getdoc(entry.object) or ""),
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


def _signature(entry: catalog.Entry) -> str:
    """The signature with one parameter on a line."""
    signature = inspect.signature(entry.object)
    lines: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in lines:
            lines.append("*")
        lines.append(str(parameter))
    body = "".join(f"    {line},\n" for line in lines)
    if inspect.isclass(entry.object) or signature.return_annotation is signature.empty:
        return f"{entry.name}(\n{body})"
    return f"{entry.name}(\n{body}) -> {inspect.formatannotation(signature.return_annotation)}"
