"""The documentation site; its lists of names are read from the package when it is built."""

import importlib
import inspect
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.rst import escape

import tilework
from tilework import _implementations, catalog
from tilework._implementations import Implementation, Table
from tilework._options import Options

project = "Tilework"
version = release = tilework.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["dollarmath"]
html_math_renderer = "mathml"  # which browsers draw themselves, without a script from elsewhere

autodoc_default_options = {
    "members": True,
    "exclude-members": "extra_repr",
    "show-inheritance": True,
}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Deviations", "Reference"]

html_theme = "furo"
html_title = f"Tilework {release}"
html_copy_source = False
html_show_copyright = False

# What a browser fetches to show a page.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|embed)\b[^>]*?\bsrc=["'](?:https?:)?//[^"']+"""
    r"""|<link\b(?=[^>]*\brel=["'][^"']*(?:stylesheet|icon|preload|preconnect))[^>]*"""
    r"""\bhref=["'](?:https?:)?//[^"']+"""
    r"""|(?:url\(|@import)\s*["']?(?:https?:)?//[^"')]+"""
)
TEMPLATES = ("catalogue", "implementations")


def write_api_pages(app: Sphinx) -> None:
    """Write ``api/<family>.md`` for each family that has public names."""
    folder = Path(app.srcdir) / "api"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for family in tilework.FAMILIES:
        module = importlib.import_module(f"tilework.{family}")
        directives = [f".. automodule:: tilework.{family}\n   :no-members:"]
        for name in sorted(module.__all__, key=str.lower):  # a function before its module
            value = getattr(module, name)
            kind = "class" if inspect.isclass(value) else "function" if callable(value) else "data"
            directives.append(f".. auto{kind}:: {name}")
        if module.__all__:
            body = "\n\n".join(directives)
            page = f"# tilework.{family}\n\n```{{eval-rst}}\n{body}\n```\n"
            (folder / f"{family}.md").write_text(page)


def rows(table: Table) -> list[list[str]]:
    """What the implementations of a primitive support, with a column for each of them."""
    describe: dict[str, Callable[[Implementation], str]] = {
        "": lambda one: f"``{one.name}``",
        "For": lambda one: escape(one.when or "everything"),
        "Devices": lambda one: ", ".join(one.devices) or "any",
        "Dtypes": lambda one: ", ".join(str(dtype).split(".")[1] for dtype in one.dtypes),
        "Memory": lambda one: escape(one.memory),
        "Backward": lambda one: escape(one.backward),
        "Deterministic": lambda one: "yes" if one.deterministic else "no",
        "Needs": lambda one: escape(one.needs or "nothing else"),
        "Checked on": lambda one: escape(one.checked_on or "nothing yet"),
    }
    return [[title, *map(cell, table)] for title, cell in describe.items()]


def fill_in(app: Sphinx, docname: str, source: list[str]) -> None:
    """Render the pages that are Jinja templates, anew in each build."""
    if docname not in TEMPLATES:
        return
    app.env.note_reread()
    context = {
        "families": {
            family: list(members)
            for family, members in itertools.groupby(catalog.entries(), lambda one: one.family)
        },
        "tables": [(names, rows(table)) for names, table in _implementations.shared()],
        "escape": escape,
    }
    source[0] = app.builder.templates.render_string(source[0], context)


def describe_options(
    app: Sphinx, what: str, name: str, object_: Any, options: Any, lines: list[str]
) -> None:
    """Give a twin the descriptions of its options, which stand in its function's docstring."""
    function = catalog.function_of(object_)
    if function is None or "Args:" in lines:
        return
    arguments = inspect.signature(object_).parameters
    section = (inspect.getdoc(function) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    described = [
        one for one in re.split(r"\n(?=    \w)", section) if one.strip().split(":")[0] in arguments
    ]
    place = lines.index("Example:")
    lines[place:place] = ["Args:", *"\n".join(described).split("\n"), ""]


def show_public_bases(
    app: Sphinx, name: str, object_: type, options: Any, bases: list[type]
) -> None:
    """Show a private base as the first public one among its own."""
    if not issubclass(object_, Options):
        return
    public = [
        next(one for one in base.__mro__ if "._" not in f"{one.__module__}.{one.__name__}")
        for base in bases
    ]
    bases[:] = [one for one in public if not any(one in other.__mro__[1:] for other in public)]


def inline_math(translator: Any, node: nodes.math) -> None:
    """Write a formula of the text."""
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def displayed_math(translator: Any, node: nodes.math_block) -> None:
    """Write a formula of its own, or several that blank lines part."""
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    formulas = re.split(r"\n\s*\n", node.astext().strip())
    translator.body += [convert(formula, display="block") for formula in formulas]
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def refuse_urls(app: Sphinx, exception: Exception | None) -> None:
    """Let the build fail if a page needs the network to be shown."""
    built = [] if exception else sorted(Path(app.outdir).rglob("*"))
    found = [
        f"{path.relative_to(app.outdir)}: {match[0]}"
        for path in built
        if path.suffix in (".html", ".css")
        for match in FETCHED.finditer(path.read_text(encoding="utf-8"))
    ]
    if found:
        raise ExtensionError("a built page loads from the network: " + "; ".join(found))


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (inline_math, None), (displayed_math, None))
    app.connect("build-finished", refuse_urls)
    # Before napoleon, which reads the sections.
    app.connect("autodoc-process-docstring", describe_options, priority=400)
    app.connect("autodoc-process-bases", show_public_bases)
    app.connect("builder-inited", write_api_pages)
    app.connect("source-read", fill_in)
