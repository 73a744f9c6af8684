"""Sphinx's configuration: ``make docs`` builds the site from these pages and from the docstrings."""

import re
from importlib import import_module
from inspect import isclass, isfunction
from typing import Any

import fusednn

project = "fusednn"
author = "the fusednn developers"
version = release = fusednn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["benchmarks/*.json"]
myst_heading_anchors = 3
default_role = "py:obj"  # `name` in docstrings links to what it names, where that has a page
suppress_warnings = ["misc.highlighting_failure"]  # of excerpts
nitpicky = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"fusednn {version}"
html_copy_source = False


def setup(app: Any) -> None:
    app.connect("source-read", _without_links_out)
    app.connect("source-read", _with_contents)
    app.connect("autodoc-process-docstring", _with_formulas)


def _without_links_out(app: Any, name: str, source: list[str]) -> None:
    """Pages link to files of the repository, which the site doesn't have: their names remain."""
    source[0] = re.sub(r"\[`?([^]`]+)`?\]\(\.\./[^)]*\)", r"`\1`", source[0])


def _with_contents(app: Any, name: str, source: list[str]) -> None:
    """A line ``<!-- contents: fusednn.layers -->`` becomes all that a package exports, by the modules of its families.

    What the page of models documents isn't repeated.
    """
    source[0] = re.sub(r"<!-- contents: (.*) -->", lambda match: _contents(match[1]), source[0])


def _contents(package: str) -> str:
    exported = import_module(package)
    families: dict[str, list[str]] = {}
    for name in exported.__all__:
        thing = getattr(exported, name)
        elsewhere = re.search(r"layers\.replacement|\.register$", getattr(thing, "__module__", ""))
        if (isclass(thing) or isfunction(thing)) and not elsewhere:
            kind = "class" if isclass(thing) else "function"
            families.setdefault(thing.__module__.split(".")[-1], []).append(f".. auto{kind}:: {package}.{name}")
    sections = []
    for family, directives in sorted(families.items()):
        title = family.replace("_", " ").capitalize()
        sections += [f"## {title}", "```{eval-rst}", *directives, "```", ""]
    return "\n".join(sections)


def _with_formulas(app: Any, kind: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Formulas and shapes stand in docstrings as they are read: (N, *), |x|, beta_."""
    lines[:] = [_escaped(line) for line in lines]


def _escaped(line: str) -> str:
    parts = re.split(r"(``.*?``|`.*?`)", line)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([*|])", r"\\\1", parts[i])
        parts[i] = re.sub(r"(\w)_(?!\w)", r"\1\\_", parts[i])
    return "".join(parts)
