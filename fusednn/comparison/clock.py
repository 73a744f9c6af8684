"""How long training steps take: copies take turns on the same batches, so that drifts of the machine hit all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

from ..layers.fusion.members import observe_modules
from .contestants import Contestant

__all__ = ["PHASES", "Times", "measure"]

PHASES = ("forward", "backward", "optimizer", "step")


@dataclass(frozen=True)
class Times:
    """Milliseconds of each phase, a sample a step: until the host goes on, of the device, of the clock on the wall.

    ``ratios`` are stock's wall time over this copy's, of steps that followed one another; ``layers`` has what the host
    spends in each layer's own forward code.
    """

    host: Mapping[str, list[float]]
    device: Mapping[str, list[float]]
    wall: Mapping[str, list[float]]
    ratios: list[float]
    layers: Mapping[str, float]

    def middle(self, kind: str, phase: str) -> tuple[float, float, float] | None:
        """Median, and the first and last tenth."""
        samples: list[float] = getattr(self, kind).get(phase, [])
        if len(samples) < 2:
            return None
        tenths = quantiles(samples, n=10, method="inclusive")
        return median(samples), tenths[0], tenths[-1]


def measure(
    contestants: Mapping[str, Contestant], steps: int, device: torch.device, tick: Callable[[], object]
) -> dict[str, Times]:
    """Time ``steps`` steps of each, after two that aren't counted; ``tick`` is called after each round."""
    samples: dict[str, list[Mapping[str, Mapping[str, float]]]] = {name: [] for name in contestants}
    names = list(contestants)
    for step in range(steps + 2):
        turn = step % len(names)
        for name in names[turn:] + names[:turn]:
            taken = _timed_step(contestants[name], step, device)
            if step >= 2:
                samples[name].append(taken)
        tick()
    first = samples[names[0]]
    found = {}
    for name, own in samples.items():
        host, gpu, wall = (
            {phase: [one[kind][phase] for one in own if phase in one[kind]] for phase in PHASES} for kind in _KINDS
        )
        ratios = [a["wall"]["step"] / b["wall"]["step"] for a, b in zip(first, own, strict=True)]
        found[name] = Times(host, gpu, wall, ratios, _host_by_layer(contestants[name]))
    return found


_LAYER_STEPS = 3
_KINDS = ("host", "device", "wall")


def _timed_step(contestant: Contestant, step: int, device: torch.device) -> dict[str, dict[str, float]]:
    batch = contestant.task.batch(step)
    on_gpu = device.type == "cuda"
    synchronize: Callable[[], Any] = torch.cuda.synchronize if on_gpu else lambda: None
    events: list[Any] = []

    def mark() -> float:
        if on_gpu:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
        return time.perf_counter()

    collects = gc.isenabled()
    gc.disable()
    try:
        contestant.optimizer.zero_grad(set_to_none=True)
        synchronize()
        marks = [mark()]
        _, loss = contestant.forward(batch, step)
        marks.append(mark())
        loss.backward()
        marks.append(mark())
        contestant.optimizer.step()
        marks.append(mark())
        synchronize()
        end = time.perf_counter()
    finally:
        if collects:
            gc.enable()
    host = {phase: 1e3 * (marks[i + 1] - marks[i]) for i, phase in enumerate(PHASES[:3])}
    host["step"] = 1e3 * (marks[3] - marks[0])
    gpu = {phase: events[i].elapsed_time(events[i + 1]) for i, phase in enumerate(PHASES[:3])} if on_gpu else {}
    if gpu:
        gpu["step"] = sum(gpu.values())
    return {"host": host, "device": gpu, "wall": {"step": 1e3 * (end - marks[0])}}


def _host_by_layer(contestant: Contestant) -> dict[str, float]:
    """Milliseconds that the host spends in each layer's own forward code, its children's apart: the least of a few."""
    if not contestant.watchable:
        return {}
    names = {module: name or "(the model)" for name, module in contestant.model.named_modules()}
    least: dict[str, float] = {}
    running: list[tuple[str, float]] = []  # and since when
    spent: dict[str, float] = {}

    def enter(module: nn.Module, _: Any) -> None:
        if module in names:
            running.append((names[module], time.perf_counter()))

    def leave(module: nn.Module, _: Any) -> None:
        if module in names:
            name, since = running.pop()
            whole = 1e3 * (time.perf_counter() - since)
            spent[name] = spent.get(name, 0.0) + whole
            if running:
                outer, _since = running[-1]
                spent[outer] = spent.get(outer, 0.0) - whole

    for step in range(_LAYER_STEPS):
        batch = contestant.task.batch(step)
        spent.clear()
        with observe_modules(enter, leave):
            contestant.forward(batch, step)
        least |= {name: min(value, least.get(name, value)) for name, value in spent.items()}
    return least
