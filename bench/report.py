"""Turn result files into a report: ``python -m fusednn bench report FILE... [-o REPORT.md] [--plots FOLDER]``.

Each file is validated first: schema, samples and what is said to follow from them, and, where there is a repository,
that the sources which ran are those of the commit that the file names.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fusednn_bench import documents
from fusednn_bench.environment import ROOT
from fusednn_bench.goals import load_goals
from fusednn_bench.plots import draw_plots
from fusednn_bench.provenance import source_problems
from fusednn_bench.render import render
from fusednn_bench.results import InvalidResultError, load_result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 for an invalid file or, with ``--check``, a document that isn't current; 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="fusednn bench report", description="Turn benchmark results into a report.")
    parser.add_argument("results", type=Path, nargs="*", metavar="FILE", help="what the benchmarks wrote")
    parser.add_argument("-o", "--output", type=Path, help="write here instead of to the terminal")
    parser.add_argument(
        "--beside", type=Path, action="append", default=[], metavar="FILE", help="only compare with this"
    )
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw plots, too")
    parser.add_argument("--uncommitted", action="store_true", help="sources that were changed since their commit, too")
    parser.add_argument("--docs", action="store_true", help="write the documents, from all of bench/results")
    parser.add_argument("--check", action="store_true", help="with --docs: write nothing, say whether they are current")
    parsed = parser.parse_args(arguments)
    if parsed.docs == bool(parsed.results) or (parsed.check and not parsed.docs):
        parser.print_usage(sys.stderr)
        return 2
    try:
        results = load_results(parsed.results or documents.committed_results(ROOT), uncommitted=parsed.uncommitted)
        compared = load_results(parsed.beside)
    except InvalidResultError as error:
        print(error, file=sys.stderr)
        return 1
    if parsed.docs:
        return _documents(results, check=parsed.check)
    report_folder = parsed.output.resolve().parent if parsed.output else Path.cwd()
    plots = (
        [] if parsed.plots is None else [p for name, r in results.items() for p in draw_plots(r, name, parsed.plots)]
    )
    links = [Path(os.path.relpath(plot.resolve(), report_folder)) for plot in plots]
    report = render(results, load_goals(), links, compared)
    if parsed.output:
        parsed.output.write_text(report, encoding="utf-8")
    else:
        print(report, end="")
    return 0


def load_results(paths: Iterable[Path], *, uncommitted: bool = False) -> dict[str, dict[str, Any]]:
    """Valid results by file name.  Raises InvalidResultError where one isn't valid."""
    results: dict[str, dict[str, Any]] = {}
    for path in paths:
        result = load_result(path)
        allowed = uncommitted and result["source"]["dirty"]
        if not allowed and (found := source_problems(result)):
            raise InvalidResultError(f"{path}: {'; '.join(found)}")
        if results.setdefault(path.name, result) is not result:
            raise InvalidResultError(f"{path}: another file has this name")
    return results


def _documents(results: dict[str, dict[str, Any]], *, check: bool) -> int:
    if not check:
        documents.write(results, ROOT)
        return 0
    stale = documents.stale(results, ROOT)
    for path in stale:
        print(f"not current: {path.relative_to(ROOT)}; run python -m fusednn bench report --docs", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
