"""Render a result file as Markdown: ``python bench/report.py RESULT.json [-o REPORT.md]``.

The file is validated first: its schema version, its commit, and that every case has samples.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fusednn_bench.goals import judge, load_goals
from fusednn_bench.results import InvalidResultError, load_result
from fusednn_bench.tables import counted_table, markdown_table, timed_tables


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 for an invalid file."""
    parser = argparse.ArgumentParser(description="Render a benchmark result as Markdown.")
    parser.add_argument("result", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="write here instead of to the terminal")
    parsed = parser.parse_args(arguments)
    try:
        report = render(load_result(parsed.result), parsed.result.name)
    except InvalidResultError as error:
        print(error, file=sys.stderr)
        return 1
    if parsed.output:
        parsed.output.write_text(report, encoding="utf-8")
    else:
        print(report, end="")
    return 0


def render(result: Mapping[str, Any], name: str) -> str:
    """The report of a valid result, generated from its data alone."""
    parts = [f"# Benchmark of {result['date']}", _origin(result, name)]
    if result["kind"] == "counted":
        parts += ["Counted in Triton's interpreter; nothing was timed.", counted_table(result["cases"])]
    else:
        parts += [timed_tables(result), "## Goals", _goals(result)]
    if result["left_out"]:
        rows = [(item["case"], item["contestant"] or "all", item["reason"]) for item in result["left_out"]]
        parts += ["## Left out", markdown_table(("case", "contestant", "reason"), rows)]
    return "\n\n".join(parts) + "\n"


def _origin(result: Mapping[str, Any], name: str) -> str:
    environment, source = result["environment"], result["source"]
    facts = [f"{key} {environment[key]}" for key in ("driver", "torch", "triton", "python", "cuda") if environment[key]]
    state = {True: ", changed since", False: "", None: ", copy without a repository"}[source["dirty"]]
    lines = [
        f"- Device: {environment['device']}; {', '.join(facts)}",
        f"- Sources: commit {source['commit']}{state}; SHA-256 {source['sha256'][:16]}",
        f"- Data: `{name}`{'' if result['complete'] else ', **incomplete**: the run was interrupted'}",
    ]
    return "\n".join(lines)


def _goals(result: Mapping[str, Any]) -> str:
    verdicts = list(judge(result, load_goals()))
    counted = Counter(verdict.outcome for verdict in verdicts)
    total = ", ".join(f"{counted[outcome]} {outcome}" for outcome in ("met", "missed", "open"))
    head = ("goal", "operation", "dtype", "size", "wanted", "measured", "result")
    order = ("missed", "open", "met")
    rows = [
        (v.goal.name, v.operation, v.dtype, v.size, v.goal.wanted, v.value, v.outcome)
        for v in sorted(verdicts, key=lambda verdict: order.index(verdict.outcome))
    ]
    return f"{total}.\n\n{markdown_table(head, rows)}"


if __name__ == "__main__":
    sys.exit(main())
