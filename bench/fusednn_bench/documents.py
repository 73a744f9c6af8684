"""The documents that take figures from results: ``docs/benchmarks.md`` with its plots, and blocks of two others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .goals import Goal, load_goals
from .memory_table import layers_table, memory_summary, missed_goals
from .plots import digest_of_plot, draw_plots, plot_digest, plot_names
from .render import render, summary

__all__ = ["committed_results", "stale", "write"]

_PAGE, _GUIDE = Path("docs") / "benchmarks.md", Path("docs") / "memory.md"
_PLOTS = Path("docs") / "benchmarks"
_BEGIN, _END = "<!-- benchmarks: begin (python -m fusednn bench report --docs) -->", "<!-- benchmarks: end -->"

#: Networks whose census the guide shows.
_IN_GUIDE = ("BERT block", "ResNet-50", "EfficientNet-B0")

_Results = Mapping[str, Mapping[str, Any]]


def committed_results(root: Path) -> list[Path]:
    """The result files that documents are made of."""
    return sorted((root / "bench" / "results").glob("*.json"))


def write(results: _Results, root: Path) -> None:
    """Write all documents, and remove plots of results that there no longer are."""
    folder = root / _PLOTS
    kept = {plot for name, result in results.items() for plot in draw_plots(result, name, folder)}
    for plot in set(folder.glob("*.png")) - kept:
        plot.unlink()
    for path, text in _texts(results, root).items():
        path.write_text(text, encoding="utf-8")


def stale(results: _Results, root: Path) -> list[Path]:
    """Documents and plots that `write` would change."""
    plots = {root / _PLOTS / plot: plot_digest(r) for name, r in results.items() for plot in plot_names(r, name)}
    changed = [path for path, text in _texts(results, root).items() if not path.exists() or path.read_text() != text]
    changed += [path for path, digest in plots.items() if not path.exists() or digest_of_plot(path) != digest]
    return changed + sorted(set((root / _PLOTS).glob("*.png")) - set(plots))


def _texts(results: _Results, root: Path) -> dict[Path, str]:
    goals = load_goals()
    plots = [Path(_PLOTS.name) / plot for name, result in results.items() for plot in plot_names(result, name)]
    readme = (root / "README.md").read_text()
    before, _, rest = readme.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    block = f"{_BEGIN}\n{summary(results, goals)}\n{_END}"
    readme = f"{before}{block}{after}"
    texts = {}
    for result in results.values():
        if result["kind"] == "memory":
            readme = _filled(readme, "memory", memory_summary([result]))
        if block := _guide_block(result, goals):
            texts[root / _GUIDE] = _filled(texts.get(root / _GUIDE) or (root / _GUIDE).read_text(), *block)
    note = "<!-- Generated from bench/results by python -m fusednn bench report --docs: don't edit. -->\n\n"
    return {root / _PAGE: note + render(results, goals, plots), root / "README.md": readme, **texts}


def _guide_block(result: Mapping[str, Any], goals: Iterable[Goal]) -> tuple[str, str] | None:
    """The name and the content of the guide's block that this result fills."""
    if result["kind"] == "memory":
        return "missed", missed_goals(result, goals)
    return ("layers", layers_table(result, _IN_GUIDE)) if result["kind"] == "census" else None


def _filled(text: str, name: str, content: str) -> str:
    """The text with this between its marks of that name."""
    begin, end = f"<!-- {name}: begin (from bench/results) -->", f"<!-- {name}: end -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"
