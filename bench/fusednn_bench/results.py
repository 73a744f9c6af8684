"""Result files: one JSON object per run.  The schema is described in ``bench/README.md``, and checked by `schema`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from fusednn.benchmark.quantiles import spread

from .schema import SAMPLED, SCHEMA_VERSION, problems

__all__ = [
    "TIME_LIMIT",
    "InvalidResultError",
    "load_result",
    "new_result",
    "reserve_file",
    "save_result",
    "with_spreads",
]

Result = dict[str, Any]

#: Why cases are left out that weren't begun in time.
TIME_LIMIT = "time limit"


class InvalidResultError(ValueError):
    """A file is no valid result."""


def new_result(
    kind: str, environment: Mapping[str, Any], source: Mapping[str, Any], settings: Mapping[str, Any]
) -> Result:
    """An empty result; ``kind`` is one of `schema.KINDS`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "complete": False,
        "environment": dict(environment),
        "source": dict(source),
        "settings": dict(settings),
        "copy": None,
        "matrix_product": None,
        "cases": [],
        "left_out": [],
    }


def with_spreads(record: Mapping[str, Any]) -> dict[str, Any]:
    """A timed record with its samples as they will be written, and what they amount to."""
    rounded: dict[str, Any] = _rounded(record)
    for field in SAMPLED:
        if samples := rounded.get(f"{field}_us"):
            rounded[f"{field}_spread_us"] = {"samples": len(samples), **_rounded(spread(samples)._asdict())}
    return rounded


def reserve_file(result: Result, folder: Path) -> Path:
    """A new file ``<device>-<date and time>.json`` in ``folder``: nobody else's."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", result["environment"]["device"].lower()).strip("-") or "unknown"
    moment = re.sub(r"[-:]", "", result["date"][:19])
    name = f"{device}-{moment}" if result["kind"] == "timed" else f"{device}-{moment}-{result['kind']}"
    for attempt in range(1000):
        path = folder / (f"{name}-{attempt}.json" if attempt else f"{name}.json")
        try:
            path.open("x").close()
        except FileExistsError:
            continue
        return path
    raise FileExistsError(folder / name)


def save_result(result: Result, path: Path) -> None:
    """Replace ``path`` in one step, so that whoever interrupts a run finds the last whole file.  A line per record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    rounded = _rounded(result)
    parts = [f'"{key}": {_json(value, key in ("cases", "left_out"))}' for key, value in rounded.items()]
    try:
        temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _json(value: Any, a_line_each: bool) -> str:
    if a_line_each and value:
        return "[\n" + ",\n".join(json.dumps(item, allow_nan=False) for item in value) + "\n]"
    return json.dumps(value, allow_nan=False)


def _rounded(value: Any) -> Any:
    """The same data with floats to 6 digits: events resolve less, and files stay small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def load_result(path: Path) -> Result:
    """Read and validate a result file.  Raises InvalidResultError with everything that is wrong with it.

    Where its sources come from is another question: `provenance.source_problems`.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidResultError(f"{path}: {error}") from error
    if found := problems(result):
        raise InvalidResultError(f"{path}: " + "; ".join(found))
    loaded: Result = result
    return loaded


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON's")
