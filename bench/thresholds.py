"""Where one of our two ways becomes the faster one: ``python bench/thresholds.py QUESTION -o FILE``.

Both ways are timed on each side of the place where the library changes over, by giving its answer for it, and which one
it would have taken is written beside them.  ``small`` asks from which size on a kernel of ours is faster than stock's,
and ``clusters`` the same of several layers in one: below it the host is what a call waits for.  Sizes lie about what
`fusednn.kernels.base.figures` says.  ``FILE`` holds all questions; the one that is asked again is replaced.  Without a
GPU bytes are counted in the place of times.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest import mock

import torch

BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH))

from fusednn_bench.where import TIMED, prepare

if __name__ == "__main__":  # whoever imports this has decided
    prepare()
# isort: split
from fusednn_bench.environment import describe_environment, describe_settings, describe_sources
from fusednn_bench.instant import run_once
from fusednn_bench.measure import count, hold
from fusednn_bench.parts import QUESTIONS
from fusednn_bench.results import load_result, new_result, save_result

from fusednn.autograd.decisions import forget_decisions
from fusednn.autograd.operators import forget_plans
from fusednn.benchmark.cases import Case
from fusednn.benchmark.protocol import Effort
from fusednn.benchmark.quantiles import median
from fusednn.benchmark.timing import DeviceTimer
from fusednn.kernels.base.figures import most_small_bytes

_EFFORT = Effort(warmup_rounds=1, large_rounds=6, small_rounds=10, host_rounds=10)


@dataclass(frozen=True)
class Question:
    """``predicate`` is the function of the library that answers; None where the contestants are ours and stock's."""

    predicate: str | None
    cases: tuple[Case, ...]


def questions() -> dict[str, Question]:
    conv, maxout = import_module("bench_conv"), import_module("bench_maxout")
    return {
        "conv": Question("fusednn.kernels.conv.takes_single", tuple(_convolutions(conv))),
        "maxout": Question("fusednn.kernels.linear_maxout.takes_fused", tuple(_maxouts(maxout))),
        "maxout_backward": Question("fusednn.kernels.linear_maxout.takes_fused_backward", tuple(_maxouts(maxout))),
        "small": Question(None, tuple(_about(_LAYERS))),
        "clusters": Question(None, tuple(_about(_CLUSTERS))),
    }


def _convolutions(bench: Any) -> Iterator[Case]:
    """Depths of 27 to 576, on both sides of what was predicted; windows side by side, and overlapping."""
    for pool, padding in (((2, 2, 0), "plain"), ((3, 2, 1), "overlapping")):
        for channels in (3, 8, 16, 32, 64):
            stage = bench.Stage(channels, 112 if TIMED else 12, 64 if TIMED else 16, 3, padding=1, pool=pool)
            operation = bench.staged(f"conv_depth_{9 * channels}_{padding}", stage)
            yield Case(operation, torch.bfloat16, "threshold", bench.batch_of(stage, 32 if TIMED else 1))


def _maxouts(bench: Any) -> Iterator[Case]:
    for pieces in bench.PIECES:
        for features in (256, 512, 1024, 2048, 4096) if TIMED else (32,):
            operation = bench.OPERATIONS[f"maxout_linear_{pieces}"]
            shape = (8192 if TIMED else 64, features)
            yield Case(operation, torch.bfloat16, f"threshold_{features}", shape)


#: By module, operations of ours in the place of a layer, and of several.
_LAYERS = {"bench_activation": ("relu", "gelu"), "bench_softmax": ("softmax",), "bench_batch_norm": ("batch_norm",)}
_CLUSTERS = {
    "bench_batch_norm": ("batch_norm_act_relu", "batch_norm_act_add_relu"),
    "bench_dropout": ("bias_activation_dropout_relu",),
}
_FIRST_LAYER = {
    **dict.fromkeys(_CLUSTERS["bench_batch_norm"], "batch_norm"),
    "bias_activation_dropout_relu": "relu",
}


def _about(modules: Mapping[str, tuple[str, ...]]) -> Iterator[Case]:
    """Sizes on both sides of that up to which the library leaves an operation, or the first of several, to PyTorch."""
    columns, dtype = 1024, torch.bfloat16
    for module, names in modules.items():
        operations = import_module(module).OPERATIONS
        for name in names:
            most = most_small_bytes(_FIRST_LAYER.get(name, name), differentiable=True)
            for part in (1 / 16, 1 / 4, 1 / 2, 2, 8) if TIMED else (0,):
                rows = max(2, round(part * most / (dtype.itemsize * columns)))
                yield Case(operations[name], dtype, f"threshold_{rows}", (rows, columns))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Where one of our two ways becomes the faster one.")
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("-o", "--output", type=Path, help="a result file; needed but with --warm")
    parser.add_argument("--warm", action="store_true", help="compile what is needed, and write nothing")
    parsed = parser.parse_args(arguments)
    if parsed.warm:
        for case in questions()[parsed.question].cases:
            warm(case, questions()[parsed.question].predicate)
        return 0
    if not parsed.output:
        parser.error("no --output")
    result = _result(parsed.output)
    result["cases"] = [record for record in result["cases"] if record["question"] != parsed.question]
    question = questions()[parsed.question]
    for case in question.cases:
        for record in contest(case, question.predicate):
            result["cases"].append({"question": parsed.question, **record})
        save_result(result, parsed.output)
    return 0


def contest(case: Case, predicate: str | None) -> Iterator[dict[str, Any]]:
    """Records of both ways; ``taken`` is the library's."""
    if predicate is None:
        taken = "fusednn" if takes_kernel(case) else "eager"
        for record in _records(case, ("fusednn", "eager")):
            yield {**record, "taken": record["contestant"] == taken}
        return
    library = library_answers(case, predicate)
    for answer, name in ((True, "one kernel"), (False, "apart")):
        with _answering(predicate, mock.Mock(return_value=answer)):
            for record in _records(case, ("fusednn",)):
                yield {**record, "contestant": name, "taken": answer in library}


def takes_kernel(case: Case) -> bool:
    """Whether the library takes its own kernel at this size, in training."""
    size = case.numel * case.dtype.itemsize
    return size > most_small_bytes(case.operation.name, differentiable=True)


def warm(case: Case, predicate: str | None) -> None:
    """Call both ways once."""
    if predicate is None:
        run_once(case, ("fusednn", "eager"))
        return
    for answer in (True, False):
        with _answering(predicate, mock.Mock(return_value=answer)):
            run_once(case, ("fusednn",))


def library_answers(case: Case, predicate: str) -> set[bool]:
    """What the library answers by itself, for the case."""
    ask, answers = resolve_name(predicate), set()

    def noted(*arguments: Any, **keywords: Any) -> bool:
        answers.add(answer := bool(ask(*arguments, **keywords)))
        return answer

    with _answering(predicate, noted):
        run_once(case, ("fusednn",))
    return answers


@contextmanager
def _answering(predicate: str, answer: Any) -> Iterator[None]:
    """With another answer, for which everything that was decided by the last one is forgotten."""
    with mock.patch(predicate, answer):
        forget_decisions()
        forget_plans()
        yield
    forget_decisions()
    forget_plans()


def _records(case: Case, contestants: tuple[str, ...]) -> list[dict[str, Any]]:
    if not TIMED:
        return [record for record in count(case) if record["contestant"] in contestants]
    timer = _timer()
    records = []
    for record in hold(case, timer, contestants, _EFFORT).records:
        figures = {f"{name}_us": median(record[f"{name}_us"]) for name in ("device", "host") if record[f"{name}_us"]}
        records.append({**record, "wall_us": 0.0, "host_us": 0.0, **figures})
    return records


@cache
def _timer() -> DeviceTimer:
    return DeviceTimer()


def _result(output: Path) -> dict[str, Any]:
    if output.exists():
        return load_result(output)
    kind = "thresholds" if TIMED else "counted"
    return new_result(kind, describe_environment(), describe_sources(), describe_settings())


if __name__ == "__main__":
    sys.exit(main())
