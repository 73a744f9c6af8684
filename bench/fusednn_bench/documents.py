"""The documents that take figures from results: ``docs/benchmarks.md`` with its plots, and a block of the README."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .goals import load_goals
from .memory_table import memory_summary
from .plots import digest_of_plot, draw_plots, plot_digest, plot_names
from .render import render, summary

__all__ = ["committed_results", "stale", "write"]

_PAGE = Path("docs") / "benchmarks.md"
_PLOTS = Path("docs") / "benchmarks"
_BEGIN, _END = "<!-- benchmarks: begin (python -m fusednn bench report --docs) -->", "<!-- benchmarks: end -->"

_BEGIN_MEMORY, _END_MEMORY = "<!-- memory: begin (from bench/results/memory.json) -->", "<!-- memory: end -->"

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
    if memory := memory_summary([result for result in results.values() if result["kind"] == "memory"]):
        before, _, rest = readme.partition(_BEGIN_MEMORY)
        readme = f"{before}{_BEGIN_MEMORY}\n{memory}\n{_END_MEMORY}{rest.partition(_END_MEMORY)[2]}"
    note = "<!-- Generated from bench/results by python -m fusednn bench report --docs: don't edit. -->\n\n"
    return {root / _PAGE: note + render(results, goals, plots), root / "README.md": readme}
