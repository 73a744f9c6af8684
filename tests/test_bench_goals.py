"""Goals: what they may be of, and which are refused."""

# ruff: noqa: E402
from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))  # the benchmarks are no package: they are not installed

from fusednn_bench.compiled_steps import compiled_steps
from fusednn_bench.goals import Goal, load_goals
from fusednn_bench.memory import NETWORKS

pytestmark = pytest.mark.stock  # nothing here depends on where kernels run
FAMILIES = [import_module(path.stem) for path in sorted(BENCH.glob("bench_*.py"))]


def test_a_goal_may_be_of_some_dtypes() -> None:
    goal = Goal("a goal", ("*",), "forward", ("large",), "speedup", "eager", at_least=1, dtypes=("bf16",))
    assert goal.covers("relu", "bf16", "large", "forward")
    assert not goal.covers("relu", "fp32", "large", "forward")
    assert replace(goal, dtypes=()).covers("relu", "fp32", "large", "forward")


def test_goals_name_operations_that_exist() -> None:
    named = {name for goal in load_goals() for name in goal.operations}
    networks = [case.record("fusednn") for case in NETWORKS]
    on_the_host = {name.rsplit(" ", 2)[0] for name in json.loads((BENCH / "baseline.json").read_text())["host"]}
    known = {name for module in FAMILIES for name in module.OPERATIONS} | {case["operation"] for case in networks}
    compiled = _compiled_steps()
    known |= on_the_host | {name for name, _ in compiled}
    assert named - {"*"} <= known
    sizes = {size for one in FAMILIES for size in one.SIZES} | {case["size"] for case in networks} | {"tiny"}
    sizes |= {size for _, size in compiled}
    assert {size for goal in load_goals() for size in goal.sizes} <= sizes


def _compiled_steps() -> set[tuple[str, str]]:
    """Names and sizes, also of the steps whose library isn't installed here: those that have results."""
    cases = json.loads((BENCH / "results" / "inductor.json").read_text())["cases"]
    counted = {(case["operation"], case["size"]) for case in cases}
    return counted | {(step.name, step.size) for step in compiled_steps()}


@pytest.mark.parametrize(
    "arguments",
    [
        {"measure": "beauty", "at_least": 1.0},
        {"measure": "speedup", "at_least": 1.0},
        {"measure": "percent_of_copy", "against": "eager", "at_least": 1.0},
        {"measure": "percent_of_copy"},
        {"measure": "percent_of_product", "against": "eager", "at_least": 1.0},
        {"measure": "percent_of_copy", "at_least": 1.0, "at_most": 2.0},
    ],
)
def test_goals_without_meaning_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a goal: "):
        Goal("a goal", ("relu",), "forward", ("large",), **arguments)
