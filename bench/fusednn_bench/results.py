"""Result files: one JSON object per run.  The schema is described in ``bench/README.md``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

__all__ = ["SCHEMA_VERSION", "InvalidResultError", "load_result", "new_result", "problems", "write_result"]

SCHEMA_VERSION = 1

Result = dict[str, Any]

_CASE_KEYS = ("family", "operation", "contestant", "direction", "dtype", "shape")


class InvalidResultError(ValueError):
    """A file is no valid result."""


def new_result(
    kind: str, environment: Mapping[str, Any], source: Mapping[str, Any], settings: Mapping[str, Any]
) -> Result:
    """An empty result; ``kind`` is ``timed`` (on a GPU) or ``counted``."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "complete": False,
        "environment": dict(environment),
        "source": dict(source),
        "settings": dict(settings),
        "copy": None,
        "cases": [],
        "left_out": [],
    }


def write_result(result: Result, folder: Path) -> Path:
    """Write ``result`` as ``<device>-<date and time>.json`` into ``folder``, never over another file."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", result["environment"]["device"].lower()).strip("-") or "unknown"
    moment = re.sub(r"[-:]", "", result["date"][:19])
    name = f"{device}-{moment}" if result["kind"] == "timed" else f"{device}-{moment}-counted"
    for attempt in range(1000):
        path = folder / (f"{name}-{attempt}.json" if attempt else f"{name}.json")
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(_rounded(result), file, indent=1, allow_nan=False)
                file.write("\n")
        except FileExistsError:
            continue
        return path
    raise FileExistsError(folder / name)


def _rounded(value: Any) -> Any:
    """The same data with floats to 6 digits: events resolve less, and files stay small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def load_result(path: Path) -> Result:
    """Read and validate a result file.  Raises InvalidResultError with everything that is wrong with it."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidResultError(f"{path}: {error}") from error
    if found := problems(result):
        raise InvalidResultError(f"{path}: " + "; ".join(found))
    loaded: Result = result
    return loaded


def problems(result: Any) -> list[str]:
    """Everything that makes ``result`` invalid, in words; empty where it is valid."""
    if not isinstance(result, dict):
        return ["not a JSON object"]
    if result.get("schema_version") != SCHEMA_VERSION:
        return [f"schema version {result.get('schema_version')}, not {SCHEMA_VERSION}"]
    found = [f"no {key}" for key in ("date", "environment", "source", "cases") if not result.get(key)]
    if result.get("kind") not in ("timed", "counted"):
        found.append(f"unknown kind {result.get('kind')}")
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", str((result.get("source") or {}).get("commit"))):
        found.append("no commit")
    if not (result.get("environment") or {}).get("device"):
        found.append("no device")
    timed = result.get("kind") == "timed"
    if timed and not _positive_numbers((result.get("copy") or {}).get("samples_us")):
        found.append("no samples of the copy")
    for i, case in enumerate(result.get("cases") or ()):
        found += [f"case {i}: {problem}" for problem in _case_problems(case, timed)]
    return found


def _case_problems(case: Any, timed: bool) -> list[str]:
    if not isinstance(case, dict):
        return ["not an object"]
    found = [f"no {key}" for key in _CASE_KEYS if not case.get(key)]
    if timed:
        if not _positive_numbers(case.get("device_us")):
            found.append("no samples")
        if not _positive_numbers([case.get("budget_bytes")]):
            found.append("no budget")
    elif not _positive_numbers([case.get("bytes"), case.get("launches")]):
        found.append("no counts")
    return found


def _positive_numbers(values: Any) -> bool:
    """Whether this is a list of at least one number, all finite and above 0."""
    return (
        isinstance(values, list)
        and bool(values)
        and all(type(value) in (int, float) and 0 < value < float("inf") for value in values)
    )
