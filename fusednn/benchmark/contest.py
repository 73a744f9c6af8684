"""One case's contest: fusednn, eager PyTorch, torch.compile and peers on the same inputs, in turns.

On a GPU, `run_contest`; without one `run_clocked_contest` times the CPU's operators by the clock on the wall.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..autograd.dispatch import Choice, always_kernels, observe_choices
from .arithmetic import eager_work
from .cases import Case, Inputs, forward, gradients, make_inputs
from .protocol import COMPILE_MODES, DIRECTIONS, CaseRecord, Contest, Direction, Effort
from .timing import DEVICE, DeviceTimer, host_times, interleave, wall_times
from .validity import check, check_fresh

__all__ = ["LARGE_BYTES", "float32_products", "run_clocked_contest", "run_contest", "sets_needed"]

# Sizes below this are bound by the host: their calls are timed in groups, and on the host too.
LARGE_BYTES = 64_000_000
_MOST_SMALL_SETS = 16
#: On a CPU: sets of inputs, and what a contestant's rounds in one direction may take together.
_CPU_SETS, _CPU_SECONDS, _LEAST_ROUNDS = 4, 1.0, 5


@dataclass(frozen=True)
class Runner:
    """One contestant on the sets of inputs: the calls of a direction, with what they need prepared."""

    function: Callable[..., Tensor]
    sets: tuple[Inputs, ...]
    facts: CaseRecord = field(default_factory=dict)  # what is known of it, whatever was measured

    def calls(self, direction: Direction) -> list[Callable[[], Any]]:
        if direction == "forward":
            return [partial(forward, self.function, inputs) for inputs in self.sets]
        if direction == "backward":
            # Every graph is used once: compiled backward passes may reuse the memory of what they saved.
            return [partial(gradients, forward(self.function, inputs), inputs) for inputs in self.sets]
        return [partial(self._step, inputs) for inputs in self.sets]

    def _step(self, inputs: Inputs) -> Any:
        y = forward(self.function, inputs)
        return y, gradients(y, inputs)


def sets_needed(case: Case, l2_bytes: int) -> int:
    """Sets of inputs to rotate over: at least 4, and more than three times the L2 together.

    Small cases stop at 16 sets, and so run from L2, as they do inside a small network.
    """
    size = case.numel * case.dtype.itemsize
    needed = max(4, 3 * l2_bytes // size + 1)
    return needed if size >= LARGE_BYTES else min(needed, _MOST_SMALL_SETS)


def run_contest(
    case: Case,
    timer: DeviceTimer,
    names: tuple[str, ...],
    effort: Effort,
    directions: Sequence[Direction] = DIRECTIONS,
    *,
    cold: bool = True,
) -> Contest:
    """Check every contestant of ``names`` against eager PyTorch; time those that are right.

    Raises what fusednn raises; where another contestant fails, it is left out and the rest goes on.  Inputs are out of
    the cache (``cold``), or one set is used again and again.
    """
    with float32_products(case.operation.tf32), always_kernels():
        return _run_contest(case, timer, names, effort, directions, cold)


def run_clocked_contest(
    case: Case, names: tuple[str, ...], effort: Effort, directions: Sequence[Direction] = DIRECTIONS
) -> Contest:
    """The same on a CPU, where a call's time is that until it returns: fewer rounds where they take long."""
    sets = tuple(make_inputs(case, torch.device("cpu"), seed) for seed in range(_CPU_SETS))
    contest, runners = _entrants(case, names, sets)

    def sample(runner: Runner) -> list[float]:
        return wall_times(lambda: runner.calls(direction), lambda: None)

    for direction in directions if runners else ():
        first = interleave(runners, effort.warmup_rounds, sample)
        seconds = len(sets) * max(min(samples) for samples in first.values()) / 1e6
        rounds = min(effort.host_rounds, max(_LEAST_ROUNDS, int(_CPU_SECONDS / seconds)))
        wall_us = interleave(runners, rounds, sample)
        contest.records += [
            {**case.record(name, direction), "wall_us": wall_us[name], **runner.facts}
            for name, runner in runners.items()
        ]
    return contest


@contextmanager
def float32_products(tf32: bool | None) -> Iterator[None]:
    """Allow or forbid TF32 in products and convolutions; None changes nothing."""
    if tf32 is None:
        yield
        return
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32" if tf32 else "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def _run_contest(
    case: Case,
    timer: DeviceTimer,
    names: tuple[str, ...],
    effort: Effort,
    directions: Sequence[Direction],
    cold: bool,
) -> Contest:
    l2_bytes = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    sets = tuple(make_inputs(case, DEVICE, seed) for seed in range(sets_needed(case, l2_bytes) if cold else 1))
    contest, runners = _entrants(case, names, sets)
    for direction in directions if runners else ():
        contest.records += _time(case, direction, runners, timer, effort)
    del runners, sets
    gc.collect()
    torch.cuda.empty_cache()
    return contest


def _entrants(case: Case, names: tuple[str, ...], sets: tuple[Inputs, ...]) -> tuple[Contest, dict[str, Runner]]:
    """Those that compute the right thing; the others are left out."""
    torch._dynamo.reset()  # cases share the code that is compiled, and the compiler gives up on recompiling too often
    contest = Contest()
    runners: dict[str, Runner] = {}
    for name in names:
        try:
            runner = Runner(_contestant(name, case), sets)
            runner.facts["error_epsilons"] = check(case, runner.function, sets[0])
            check_fresh(case, runner.function, sets[0])
            if name == "fusednn":
                runner.facts["path"] = _path(runner)
            runners[name] = runner
        except Exception as error:
            contest.leave_out(name, error)
    return contest, runners


def _contestant(name: str, case: Case) -> Callable[..., Tensor]:
    if name == "fusednn":
        return case.operation.ours
    stock = case.operation.stock
    if name == "eager":
        return stock
    if name not in COMPILE_MODES:
        return case.operation.peers()[name]

    def call(*operands: Tensor) -> Tensor:
        return stock(*operands)

    compiled: Callable[..., Tensor] = torch.compile(call, fullgraph=True, dynamic=False, mode=COMPILE_MODES[name])
    return compiled


def _path(runner: Runner) -> str:
    """Whether fusednn took its kernel or the stock operator: both are legal, but only one is ours."""
    choices: list[Choice] = []
    with observe_choices(choices.append):
        forward(runner.function, runner.sets[0])
    return "; ".join(f"{choice.path}: {choice.reason}" for choice in choices)


def _time(
    case: Case, direction: Direction, runners: dict[str, Runner], timer: DeviceTimer, effort: Effort
) -> list[CaseRecord]:
    size = case.numel * case.dtype.itemsize
    large = size >= LARGE_BYTES
    sets = len(next(iter(runners.values())).sets)
    group = 1 if large else sets
    rounds = effort.large_rounds if large else effort.small_rounds

    def device(runner: Runner) -> list[float]:
        return timer.sample(lambda: runner.calls(direction), group)

    def clocked(times: Callable[..., list[float]], rounds: int) -> dict[str, list[float]]:
        def sample(runner: Runner) -> list[float]:
            return times(lambda: runner.calls(direction), torch.cuda.synchronize)

        interleave(runners, effort.warmup_rounds, sample)
        return interleave(runners, rounds, sample)

    interleave(runners, effort.warmup_rounds, device)
    device_us = interleave(runners, rounds, device)
    # Large cases aren't bound by the host; and what a user waits for is the whole step.
    host_us = {} if large else clocked(host_times, effort.host_rounds)
    wall_us = {} if large or direction != "forward_backward" else clocked(wall_times, effort.host_rounds)
    return [
        {
            **case.record(name, direction),
            "operations": eager_work(case)[direction].operations,
            "device_us": device_us[name],
            "host_us": host_us.get(name, []),
            "wall_us": wall_us.get(name, []),
            "calls_per_sample": group,
            "sets": sets,
            "rotated_bytes": sets * size,
            **_memory(runner, direction),
            **runner.facts,
        }
        for name, runner in runners.items()
    ]


def _memory(runner: Runner, direction: Direction) -> CaseRecord:
    """Bytes that one call takes at its peak beside what was there before, and that its results keep afterwards."""
    (call, *_) = Runner(runner.function, runner.sets[:1]).calls(direction)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    record = {
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
        "kept_bytes": torch.cuda.memory_allocated() - before,
    }
    del result
    return record
