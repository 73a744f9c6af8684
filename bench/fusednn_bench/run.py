"""One session of benchmarks: what it measures, the result that it gathers, and where that is kept."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fusednn.benchmark.ceilings import measure_ceilings
from fusednn.benchmark.protocol import CONTESTANTS, Contest, Effort, Measured
from fusednn.benchmark.timing import DeviceTimer

from .environment import describe_environment, describe_settings, describe_sources
from .measure import count, hold
from .results import TIME_LIMIT, Result, load_result, new_result, reserve_file, save_result, with_spreads

__all__ = ["ResumeError", "Run"]

_SAME = ("device", "torch", "triton")


class ResumeError(ValueError):
    """A result can't be continued here: it is of another device, of other sources, or of another kind."""


class Run:
    """Measures cases, each once, and saves the result after each.

    ``file`` is continued: what it holds isn't measured again.  Without it a new file goes into ``folder``; without
    either, nothing is written.  Cases that aren't begun within ``seconds`` are left out.
    """

    def __init__(self, *, timed: bool, full: bool, folder: Path | None, file: Path | None, seconds: float) -> None:
        self.timed, self.full = timed, full
        self.usual = CONTESTANTS if full else CONTESTANTS[:3]
        self.written: Path | None = None
        self._folder, self._file = folder, file
        self._ends = time.monotonic() + seconds
        self._timer: DeviceTimer | None = None
        self._contests: dict[str, Contest | Exception] = {}
        if timed:
            torch.backends.cudnn.benchmark = True
        settings = {"selection": "full" if full else "quick", "effort": vars(Effort()), **describe_settings()}
        kind = "timed" if timed else "counted"
        self.result: Result = new_result(kind, describe_environment(), describe_sources(), settings)
        if file is not None and file.exists():
            self._resume(load_result(file))

    def _resume(self, before: Result) -> None:
        """Take over what ``before`` holds.  Raises ResumeError where it was measured elsewhere, or otherwise."""
        here = self.result
        facts = {
            "kind": (before["kind"], here["kind"]),
            "sources": (before["source"]["sha256"], here["source"]["sha256"]),
            **{
                key: (before["environment"].get(key), here["environment"][key]) for key in ("device", "torch", "triton")
            },
            **{
                key: (before["settings"].get(key), value)
                for key, value in here["settings"].items()
                if key != "selection"
            },
        }
        for name, (there, now) in facts.items():
            if there != now:
                raise ResumeError(f"{name}: {there} in the file, {now} here")
        for key in ("cases", "copy", "matrix_product"):
            here[key] = before[key]
        here["left_out"] = [item for item in before["left_out"] if item["reason"] != TIME_LIMIT]

    def contest(self, case: Measured) -> Contest:
        """The contest of a case, held when it is first asked for, unless the file has it."""
        if case.id not in self._contests:
            self._contests[case.id] = self._known(case) or self._hold(case)
        held = self._contests[case.id]
        if isinstance(held, Exception):
            raise held
        return held

    def counts(self, case: Measured) -> list[dict[str, Any]]:
        """The counts of a case, ours and eager's."""
        if known := self._records(case):
            return known
        records = count(case)
        self.result["cases"] += records
        self._save()
        return records

    def finish(self, complete: bool) -> None:
        """Measure the ceilings once more, against drift, and write the result."""
        if not self.result["cases"]:
            return
        self.result["complete"] = complete and all(item["reason"] != TIME_LIMIT for item in self.result["left_out"])
        if self.timed and complete and self._timer is not None:
            self._measure_ceilings()
        self._save()

    def _records(self, case: Measured) -> list[dict[str, Any]]:
        return [record for record in self.result["cases"] if _id(record) == case.id]

    def _known(self, case: Measured) -> Contest | None:
        """What the file holds of a case, where it holds all contestants; otherwise the case begins anew."""
        records = self._records(case)
        reasons = {item["contestant"]: item["reason"] for item in self.result["left_out"] if item["case"] == case.id}
        missing = set(case.contestants(self.usual)) - {record["contestant"] for record in records} - set(reasons)
        if not missing and records:
            return Contest(records, reasons)
        self.result["cases"] = [record for record in self.result["cases"] if _id(record) != case.id]
        self.result["left_out"] = [item for item in self.result["left_out"] if item["case"] != case.id]
        return None

    def _hold(self, case: Measured) -> Contest | Exception:
        contestants = case.contestants(self.usual)
        if time.monotonic() > self._ends:
            self._leave_out(case, None, TIME_LIMIT)
            return Contest(left_out=dict.fromkeys(contestants, TIME_LIMIT))
        try:
            contest = hold(case, self._ready_timer(), contestants, Effort())
        except Exception as error:
            self._leave_out(case, None, f"{type(error).__name__}: {error}")
            self._save()
            return error
        for contestant, reason in contest.left_out.items():
            self._leave_out(case, contestant, reason)
        contest.records = [with_spreads(record) for record in contest.records]
        self.result["cases"] += contest.records
        self._save()
        return contest

    def _leave_out(self, case: Measured, contestant: str | None, reason: str) -> None:
        self.result["left_out"].append({"case": case.id, "contestant": contestant, "reason": reason})

    def _ready_timer(self) -> DeviceTimer:
        if self._timer is None:
            self._timer = DeviceTimer()
            self._measure_ceilings()
        return self._timer

    def _measure_ceilings(self) -> None:
        assert self._timer is not None
        before = {name: self.result[name] for name in ("copy", "matrix_product") if self.result[name]}
        self.result |= measure_ceilings(self._timer, before)

    def _save(self) -> None:
        if self.written is None and self._file is None and self._folder is not None:
            self._file = reserve_file(self.result, self._folder)
        if self._file is not None and self.result["cases"]:
            save_result(self.result, self._file)
            self.written = self._file


def _id(record: Mapping[str, Any]) -> str:
    return f"{record['operation']}-{record['dtype']}-{record['size']}"
