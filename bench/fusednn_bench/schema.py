"""What a valid result file is.  A file that was tampered with, cut short or written by hand should not pass."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from fusednn.benchmark.quantiles import spread

__all__ = ["FEWEST_SAMPLES", "KINDS", "SAMPLED", "SCHEMA_VERSION", "case_key", "problems"]

SCHEMA_VERSION = 2

#: ``timed`` on a GPU; ``counted`` in Triton's interpreter; ``predicted`` from counts and a machine's rates;
#: ``compiled``: what the compiler says of each kernel; ``thresholds``: two ways of ours, timed where the library takes
#: one for the other; ``counters``: what the GPU itself counts of each launch; ``memory``: what networks keep for the
#: backward pass; ``census``: which of their layers do; ``peak``: what their training steps hold at most, by a GPU's
#: allocator; ``inductor``: what compiled training steps launch and move; ``host``: what calls cost the host;
#: ``instructions``: what each launch executes for what it moves.
KINDS = (
    *("timed", "counted", "predicted", "compiled", "thresholds", "counters", "memory", "inductor", "host"),
    *("instructions", "peak", "census"),
)

#: What is timed: on the device, on the host until calls return, and until the device is done.
SAMPLED = ("device", "host", "wall")

#: Fewer samples of a case say nothing about their spread.
FEWEST_SAMPLES = 20

_CASE_KEYS = ("family", "operation", "contestant", "direction", "dtype", "shape")
_KERNEL_KEYS = ("family", "kernel", "configuration", "target")
#: Numbers that a record of each kind has; those of the second list may be 0.
_NUMBERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "timed": (("calls_per_sample", "sets"), ("budget_bytes", "peak_bytes", "kept_bytes", "error_epsilons")),
    "counted": (("bytes", "launches", "elements"), ("kernel_launches", "aten_operations")),
    "predicted": (("bytes", "predicted_us"), ("operations",)),
    "thresholds": (("device_us",), ("host_us",)),
    "host": ((), ("launches", "prepared", "dispatched")),
    "counters": (("dram_bytes", "duration_us"), ("issue_percent", "bank_conflicts")),
    "memory": ((), ("kept_bytes",)),
    "census": (("kept_bytes",), ()),
    "peak": (("peak_bytes",), ("kept_bytes",)),
    "inductor": (
        ("bytes", "launches"),
        tuple(f"{maker}_{what}" for maker in ("inductor", "library", "fusednn") for what in ("bytes", "launches")),
    ),
    "instructions": (
        ("programs", "threads", "registers", "bytes", "elements", "instructions", "issue_over_bytes"),
        ("spills", "once", "each", "trips", "busiest_over_bytes", "programs_at_once", "bytes_in_flight"),
    ),
    "compiled": (("registers", "threads"), ("occupancy", "spills", "shared_bytes", "access_bits")),
}


def problems(result: Any) -> list[str]:
    """Everything that makes ``result`` invalid, in words; empty where it is valid."""
    if not isinstance(result, dict):
        return ["not a JSON object"]
    if result.get("schema_version") != SCHEMA_VERSION:
        return [f"schema version {result.get('schema_version')}, not {SCHEMA_VERSION}"]
    found = list(_header_problems(result))
    cases = result.get("cases")
    if not isinstance(cases, list) or not cases:
        return [*found, "no cases"]
    kind = result.get("kind")
    if kind not in KINDS:
        return [*found, f"unknown kind {kind}"]
    seen: dict[tuple[Any, ...], int] = {}
    for i, case in enumerate(cases):
        if not isinstance(case, dict):
            found.append(f"case {i}: not an object")
            continue
        found += [f"case {i}: {problem}" for problem in _case_problems(case, kind, result)]
        if (first := seen.setdefault(case_key(case), i)) != i:
            found.append(f"case {i}: the same as case {first}")
    return found


def case_key(case: Mapping[str, Any]) -> tuple[Any, ...]:
    """What no two records of a file share."""
    shape = case.get("shape")
    names = (*_CASE_KEYS[:-1], "size", *_KERNEL_KEYS)
    return (*(str(case.get(name)) for name in names), str(shape))


def _header_problems(result: Mapping[str, Any]) -> Iterator[str]:
    environment, source = ({} if not isinstance(result.get(key), dict) else result[key] for key in _HEADS)
    if not environment.get("device"):
        yield "no device"
    for package in ("torch", "triton", "python"):
        if not environment.get(package):
            yield f"no version of {package}"
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", str(source.get("commit"))):
        yield "no commit"
    if not re.fullmatch(r"[0-9a-f]{64}", str(source.get("sha256"))):
        yield "no digest of the sources"
    if source.get("dirty", 0) not in (True, False, None):
        yield "whether the sources were changed is neither true nor false nor null"
    if not isinstance(result.get("settings"), dict):
        yield "no settings"
    if not isinstance(result.get("left_out"), list):
        yield "no list of what was left out"
    if not _is_moment(result.get("date")):
        yield "no date"
    if result.get("kind") == "timed":
        for ceiling, size in (("copy", "bytes"), ("matrix_product", "operations")):
            measured = result.get(ceiling)
            if not isinstance(measured, dict) or not _positive([measured.get(size)]):
                yield f"no {ceiling.replace('_', ' ')}"
            elif not _positive(measured.get("samples_us")):
                yield f"no samples of the {ceiling.replace('_', ' ')}"
    if result.get("kind") == "predicted":
        rates = (result["settings"] or {}).get("machine") if isinstance(result.get("settings"), dict) else None
        if not isinstance(rates, dict) or not _positive(
            [rates.get("copy_bytes_per_second"), rates.get("matrix_operations_per_second")]
        ):
            yield "no machine"


_HEADS = ("environment", "source")


def _is_moment(text: Any) -> bool:
    try:
        return datetime.fromisoformat(text).utcoffset() is not None
    except (TypeError, ValueError):
        return False


def _case_problems(case: Mapping[str, Any], kind: str, result: Mapping[str, Any]) -> Iterator[str]:
    for key in _KERNEL_KEYS if kind == "compiled" else _CASE_KEYS:
        if not case.get(key):
            yield f"no {key}"
    above, from_zero = _NUMBERS[kind]
    for key in above:
        if not _positive([case.get(key)]):
            yield f"{key.replace('_', ' ')} {case.get(key)!r} is no number above 0"
    for key in from_zero:
        if not (_is_number(case.get(key)) and case[key] >= 0):
            yield f"{key.replace('_', ' ')} {case.get(key)!r} is no number from 0"
    for key, value in case.items():
        if type(value) in (int, float) and not (math.isfinite(value) and value >= 0):
            yield f"{key} is {value}"
    if kind == "host" and not (_positive(case.get("cpu_us")) and len(case["cpu_us"]) >= FEWEST_SAMPLES):
        yield f"fewer than {FEWEST_SAMPLES} samples of the CPU time"
    if kind == "thresholds" and type(case.get("taken")) is not bool:
        yield "not said whether the library takes this way"
    if kind == "timed":
        if not case.get("budget_bytes") and case.get("direction") != "training_step":
            yield "no budget"  # a whole network has none
        yield from _sample_problems(case)
    if kind == "inductor":
        for what in ("bytes", "launches"):
            if case.get(what) != sum(case.get(f"{maker}_{what}", 0) for maker in ("inductor", "library", "fusednn")):
                yield f"{what} are not those of Inductor, libraries and fusednn"
    by_maker = case.get("kept_bytes_by_maker")
    if kind == "memory" and by_maker is not None and _sum(by_maker) != case.get("kept_bytes"):
        yield "kept bytes are not those of their makers"
    if kind == "instructions" and not _close(case.get("instructions"), _sum(case.get("instructions_by_pipe"))):
        yield "instructions are not those of the pipes"
    if kind == "counted" and case.get("launches") != sum(
        value for key in ("kernel_launches", "aten_operations") if _is_number(value := case.get(key))
    ):
        yield "launches are not those of kernels and operators"
    if kind == "predicted" and _positive([case.get("bytes"), case.get("predicted_us")]):
        yield from _prediction_problems(case, result)


def _sample_problems(case: Mapping[str, Any]) -> Iterator[str]:
    for field in SAMPLED:
        samples, stated = case.get(f"{field}_us"), case.get(f"{field}_spread_us")
        if field != "device" and samples in (None, []):
            continue
        if not _positive(samples):
            yield f"no samples of the {field} time"
            continue
        if len(samples) < FEWEST_SAMPLES:
            yield f"{len(samples)} samples of the {field} time, fewer than {FEWEST_SAMPLES}"
        if not isinstance(stated, dict) or stated.get("samples") != len(samples):
            yield f"samples of the {field} time are missing"
            continue
        for name, value in spread(samples)._asdict().items():
            if not _close(stated.get(name), value):
                yield f"{name} of the {field} time, {stated.get(name)}, doesn't follow from the samples"


def _prediction_problems(case: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[str]:
    machine = (result.get("settings") or {}).get("machine") or {}
    copy, matrix = (machine.get(f"{name}_per_second") for name in ("copy_bytes", "matrix_operations"))
    if _positive([copy, matrix]) and _is_number(case.get("operations")):
        expected = max(1e6 * case["bytes"] / copy, 1e6 * case["operations"] / matrix, case.get("instructions_us", 0.0))
        if not _close(case["predicted_us"], expected):
            yield f"predicted {case['predicted_us']} us don't follow from bytes, operations and instructions"


def _close(stated: Any, value: float) -> bool:
    return _is_number(stated) and math.isclose(stated, value, rel_tol=2e-5)


def _sum(values: Any) -> float:
    return (
        math.fsum(values.values()) if isinstance(values, dict) and all(map(_is_number, values.values())) else math.nan
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _positive(values: Any) -> bool:
    """Whether this is a list of at least one number, all finite and above 0."""
    return isinstance(values, list) and bool(values) and all(_is_number(value) and value > 0 for value in values)
