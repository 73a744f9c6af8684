"""What reports make of a GPU's results, which are made up here: they lead to decisions, the worst first."""

# ruff: noqa: E402
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import gpu_run
import report
from fusednn_bench import results
from fusednn_bench.schedule import Outcome

pytestmark = pytest.mark.stock  # nothing here depends on where kernels run

GPU = {"device": "Some GPU 9000", "driver": "1.2", "torch": "2", "triton": "3", "python": "3"}
NONE = {**GPU, "device": "x86_64", "driver": None}
MACHINE = {"name": "a machine", "source": "", "copy_bytes_per_second": 4e9, "matrix_operations_per_second": 8e9}


def record(contestant: str, operation: str = "relu", direction: str = "forward", **figures: Any) -> dict[str, Any]:
    """A call that must move 4 MB: 1 ms at the rate of the machine."""
    return {
        "family": {"relu": "activation", "softmax": "softmax"}[operation],
        "operation": operation,
        "contestant": contestant,
        "direction": direction,
        "dtype": "bf16",
        "size": "large",
        "shape": [1000, 1000],
        "budget_bytes": 4e6,
        **figures,
    }


def timed(contestant: str, microseconds: float, operation: str = "relu", direction: str = "forward") -> dict[str, Any]:
    facts = {"calls_per_sample": 1, "sets": 4, "peak_bytes": 1, "kept_bytes": 1, "error_epsilons": 0.5, "operations": 0}
    samples = [microseconds * (0.9 + 0.01 * i) for i in range(21)]
    return results.with_spreads(record(contestant, operation, direction, device_us=samples, **facts))


def counted(kernel: str, megabytes: float, operation: str = "relu") -> dict[str, Any]:
    figures = {"dram_bytes": 1e6 * megabytes, "duration_us": 500.0, "issue_percent": 40.0, "bank_conflicts": 7}
    return record("fusednn", operation, "forward_backward", kernel=kernel, **figures)


def way(name: str, device: float, host: float, *, taken: bool) -> dict[str, Any]:
    return record(name, device_us=device, host_us=host, taken=taken)


def executed(issue_over_bytes: float) -> dict[str, Any]:
    sizes = {"programs": 1, "threads": 128, "registers": 32, "bytes": 8, "elements": 8, "bytes_in_flight": 0}
    counts = {"instructions": 5.0, "instructions_by_pipe": {"ALU": 5.0}, "once": 9, "each": 0, "trips": 0, "spills": 0}
    shares = {"issue_over_bytes": issue_over_bytes, "busiest_pipe": "ALU", "busiest_over_bytes": 0.1}
    return record("fusednn", **sizes, **counts, **shares, programs_at_once=0, kernel="a_kernel", configuration="bf16")


def on_the_host(microseconds: float) -> dict[str, Any]:
    return record("fusednn", cpu_us=[microseconds] * 20, launches=1, prepared=0, dispatched=0)


def prediction(contestant: str, operation: str = "relu") -> dict[str, Any]:
    return record(
        contestant, operation, bytes=4e6, operations=0, operations_bound=False, predicted_us=1000.0, instructions_us=0.0
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With files of a GPU, and in ``known`` those that were made without one."""
    monkeypatch.setattr(report, "source_problems", lambda result: [])  # the commit is made up, too

    def save(name: str, kind: str, environment: dict[str, Any], cases: list[dict[str, Any]], **more: Any) -> None:
        source = {"commit": "0123456789" * 4, "dirty": True, "sha256": "ab" * 32}
        settings = {"machine": MACHINE, "over": "the GPU's own driver"}
        result = results.new_result(kind, environment, source, settings)
        results.save_result({**result, "complete": True, "cases": cases, **more}, tmp_path / f"{name}.json")

    save(
        *("benchmarks", "timed", GPU),
        [
            timed("fusednn", 1100),
            timed("eager", 880),
            timed("fusednn", 1100, direction="backward"),
            timed("eager", 2000, direction="backward"),
            timed("fusednn", 2000, "softmax"),
            timed("eager", 4000, "softmax"),
        ],
        copy={"bytes": 8000, "samples_us": [2.0]},
        matrix_product={"operations": 8000, "dtype": "bf16", "samples_us": [2.0]},
        left_out=[
            {"case": "gelu-bf16-large", "contestant": "fusednn", "reason": "wrong: 9 epsilons"},
            {"case": "mish-bf16-large", "contestant": None, "reason": results.TIME_LIMIT},
        ],
    )
    save(
        *("thresholds", "thresholds", GPU),
        [way("one kernel", 8.0, 2.0, taken=True), way("apart", 2.0, 4.0, taken=False)],
    )
    save("counters", "counters", GPU, [counted("0 relu", 3), counted("1 relu", 2), counted("0 softmax", 4, "softmax")])
    save("times", "host", GPU, [on_the_host(30.0)])
    save("known-host", "host", NONE, [on_the_host(20.0)])
    save("known-instructions", "instructions", NONE, [executed(0.5)])
    save("known-predicted", "predicted", NONE, [prediction("fusednn"), prediction("fusednn", "softmax")])
    return tmp_path


def rendered(folder: Path) -> str:
    beside = [word for path in sorted(folder.glob("known-*")) for word in ("--beside", str(path))]
    files = [str(path) for path in sorted(folder.glob("*.json")) if not path.name.startswith("known")]
    assert report.main([*files, *beside, "-o", str(folder / "report.md")]) == 0
    return (folder / "report.md").read_text()


def rows_of(text: str, title: str) -> dict[str, list[str]]:
    """Of the table under a title, by the first cell."""
    section = text.partition(f"## {title}")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_what_was_measured_stands_beside_what_was_expected(folder: Path) -> None:
    text = rendered(folder)
    assert rows_of(text, "Measured over predicted")["activation"][0] == "1.10 (1.10 to 1.10)"
    assert rows_of(text, "Measured over predicted")["softmax"][0] == "2.00 (2.00 to 2.00)"
    assert rows_of(text, "Measured over modelled host time")["activation"][0] == "1.50 (1.50 to 1.50)"
    assert rows_of(text, "Issued over expected instructions")["activation"][0] == "0.80 (0.80 to 0.80)"
    moved = rows_of(text, "What the GPU counts")["relu bf16 1000x1000"]
    assert moved == ["2", "5.00", "4.00", "1.25", "1000.00", "40.00", "relu", "14"]
    ways = rows_of(text, "Thresholds")["relu forward bf16 large 1000x1000"]
    assert ways == ["one kernel", "8.00", "apart", "4.00", "0.50"]
    assert "over the GPU's own driver" in text
    assert "## Predictions" not in text  # what is beside is compared with, and not shown


def test_the_next_steps_are_in_order_of_what_is_missing(folder: Path) -> None:
    steps = rendered(folder).partition("## What to do next")[2].partition("## Goals")[0]
    found = [line.removeprefix("1. ") for line in steps.splitlines() if line.startswith("1. ")]
    places = [
        next(i for i, line in enumerate(found) if line.startswith(beginning))
        for beginning in (
            "gelu-bf16-large: fusednn is left out: wrong",
            "softmax: takes 2.00 times what was predicted",
            "relu bf16 1000x1000: moves 1.25 times",
        )
    ]
    assert places == sorted(places)
    assert places[0] == 0
    assert any("apart is faster (0.50): correct the figures" in line for line in found)
    assert any(line.startswith("one-bit activations, forward against eager: relu") for line in found)  # a missed goal
    assert "relu forward bf16 large 1000x1000: eager is faster (0.80)" in found
    assert not any(line.startswith(("mish", "activation:", "softmax bf16")) for line in found)


def test_goals_are_judged(folder: Path) -> None:
    goals = [line for line in rendered(folder).partition("## Goals")[2].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in goals]
    assert ["one-bit activations, forward against eager", "relu", "bf16", "large", ">= 0.95", "0.80", "missed"] in cells
    assert ["one-bit activations, backward against eager", "relu", "bf16", "large", ">= 1.35", "1.82", "met"] in cells
    assert "unmeasured" in {cell[-1] for cell in cells}


def test_the_report_of_a_run_begins_with_what_failed(folder: Path) -> None:
    for path in folder.glob("known-*"):
        path.unlink()
    (folder / gpu_run.SUMMARY).write_text(json.dumps({}))
    outcomes = [
        Outcome("smoke", "smoke-pool", 1, 3.0),
        Outcome("tests", "rest-test_conv", None, 9.0),
        Outcome("smoke", "smoke-conv", 0, 9.0),
    ]
    gpu_run._write_report(folder, outcomes)
    text = (folder / gpu_run.REPORT).read_text()
    assert text.startswith("# Failed, or out of time\n\n1. smoke-pool: exit 1\n1. rest-test_conv: out of time\n\n#")
    assert "# Benchmarks" in text
    assert "smoke-conv" not in text
