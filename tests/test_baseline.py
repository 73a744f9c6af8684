"""The regression gate: bytes and launches of every benchmark are no worse than committed, and within their budgets.

Registers and spills are compared where they are at hand anyway, in `test_compile_check`.
"""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.baseline import BENCH, RENEW, applies, committed, complaint

from fusednn import kernels

import baseline  # isort: skip: beside the benchmarks, which `support.baseline` makes importable
import bench_batch_norm  # isort: skip

FAMILIES = [import_module(path.stem) for path in sorted(BENCH.glob("bench_*.py"))]
COUNTED = [(family, case) for family in FAMILIES for case in family.counted_cases()]


def _is_dear(family: Any, case: Any) -> bool:
    """Whether the same operation is counted in another dtype, which shows the same; or a CNN."""
    if case.operation.name in ("vgg", "resnet", "lenet_digits"):
        return True
    dtypes = [other.dtype for other in family.counted_cases() if other.operation.name == case.operation.name]
    return torch.bfloat16 in dtypes and case.dtype is not torch.bfloat16


@pytest.mark.kernels
@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("family", "case"),
    [
        pytest.param(family, case, marks=[pytest.mark.thorough] * _is_dear(family, case), id=case.id)
        for family, case in COUNTED
    ],
)
def test_traffic_is_no_worse(family: Any, case: Any) -> None:
    if not applies("torch"):
        pytest.skip("the baseline is another PyTorch's")
    try:
        entries, records = baseline.counted_entries(case)
    finally:
        bench_batch_norm.leave_group()
    family.test_traffic(case, records)  # the budget
    for name, figures in entries.items():
        assert not (worse := complaint("counted", name, *figures)), worse


def test_every_case_has_an_entry() -> None:
    cases = {name.rpartition(" ")[0] for name in committed()["counted"]}
    assert cases == {case.id for _, case in COUNTED}, RENEW


@pytest.mark.compiles
def test_every_configuration_has_an_entry() -> None:
    shipped = {configuration.label for configuration in kernels.shipped() if not configuration.rare}
    assert set(committed()["compiled"]) == shipped, RENEW


@pytest.mark.compiles
@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("gcc") is None, reason="the driver that does nothing is made with gcc")
def test_the_host_does_no_more() -> None:
    entries = baseline._in_another_process("host")
    assert set(entries) == set(committed()["host"]), RENEW
    for name, figures in entries.items():
        assert not (worse := complaint("host", name, *figures)), worse


@pytest.mark.compiles
@pytest.mark.thorough
def test_kernels_execute_no_more() -> None:
    if not applies("triton"):
        pytest.skip("the baseline is another Triton's")
    entries = baseline._in_another_process("instructions")
    assert set(entries) == set(committed()["instructions"]), RENEW
    for name, figures in entries.items():
        assert not (worse := complaint("instructions", name, *figures)), worse


@pytest.mark.parametrize(
    ("now", "before", "worse"),
    [
        ((4000, 1), (4000, 1), None),
        ((3999, 1), (4000, 1), None),
        ((4001, 1), (4000, 1), "4001 bytes, not 4000"),
        ((3000, 2), (4000, 1), "2 launches, not 1"),
        ((4000, 1), None, "isn't in the baseline"),
    ],
)
def test_notices_what_is_worse(now: tuple[int, int], before: tuple[int, int] | None, worse: str | None) -> None:
    assert baseline.worse("counted", now, before) == worse


def test_tells_what_changed() -> None:
    before = {"a": [40, 0], "b": [40, 0], "c": [40, 0]}
    now = {"a": [41, 0], "b": [39, 0], "d": [40, 0]}
    assert list(baseline.compare("compiled", now, before)) == [
        "compiled a: worse: registers, spills [41, 0], were [40, 0]",
        "compiled b: better: registers, spills [39, 0], were [40, 0]",
        "compiled c: gone",
        "compiled d: new",
    ]


def test_one_part_is_renewed_and_the_other_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "FILE", tmp_path / "baseline.json")
    monkeypatch.setattr(baseline, "_in_another_process", lambda part: {f"{part} b": [2, 0], f"{part} a": [1, 0]})
    assert baseline.main([]) == 0
    lines = baseline.FILE.read_text().splitlines()
    assert lines[lines.index('"counted": {') + 1] == '"counted a": [1, 0],'  # sorted, a line each
    monkeypatch.setattr(baseline, "_in_another_process", lambda part: {"c": [3, 0]})
    assert baseline.main(["--check"]) == 1
    assert baseline.main(["--only", "compiled"]) == 0
    assert (baseline.load()["counted"], baseline.load()["compiled"]) == (
        {"counted a": [1, 0], "counted b": [2, 0]},
        {"c": [3, 0]},
    )
    assert baseline.main(["--only", "compiled", "--check"]) == 0
