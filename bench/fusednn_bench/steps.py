"""Steps of optimizers: what is measured, and how.  A step has no output; it changes parameters and state in place."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusednn.benchmark.arithmetic import Work
from fusednn.benchmark.counting import counts_of
from fusednn.benchmark.protocol import Contest, Effort, NamedCase, WrongResultError
from fusednn.benchmark.timing import DEVICE, DeviceTimer, host_times, wall_times

from .peers import installed

__all__ = [
    "StepCase",
    "StepOperation",
    "check_step",
    "count_step_case",
    "eager_step_work",
    "run_step_contest",
]

_LIMIT = {torch.bfloat16: 8.0, torch.float32: 128.0}
_HOST_SIZES = ("resnet50",)
_LR = 1e-3
#: Those of stock that have ``fused=True``, and apex's multi-tensor optimizers.
_FUSED = ("SGD", "Adagrad", "Adam", "AdamW")
_APEX = {"SGD": "FusedSGD", "Adagrad": "FusedAdagrad", "Adam": "FusedAdam", "AdamW": "FusedAdam"}


#: What makes a contestant's step, from parameters and a learning rate.
Maker = Callable[[Sequence[Tensor], float], Callable[[], Any]]


@dataclass(frozen=True)
class StepOperation:
    """An optimizer with arguments: a class of ``fusednn.optim`` and of ``torch.optim`` alike.

    ``algorithm`` names its row in the kernels' table, which knows the budget.  Steps are checked at ``checked_lr``,
    where they change weights by about 1/2: much more than a rounding.
    """

    name: str
    cls: str
    algorithm: str
    arguments: dict[str, Any] = field(default_factory=dict)
    checked_lr: float = 0.5
    family: str = "optimizer"

    def contestants(self) -> dict[str, Maker]:
        """How to make each contestant's step.  ``eager`` is what stock does on a GPU by itself: foreach."""
        from fusednn import optim

        stock = getattr(torch.optim, self.cls)
        makers = {
            "fusednn": self._maker(getattr(optim, self.cls)),
            "eager": self._maker(stock, foreach=True),
            "compile": self._compiled(self._maker(stock, foreach=True)),
            "for_loop": self._maker(stock, foreach=False),
        }
        if self.cls in _FUSED:
            makers["fused"] = self._maker(stock, fused=True)
        if self.cls in _APEX and installed("apex.optimizers"):
            decoupled = {"adam_w_mode": self.cls == "AdamW"} if self.cls.startswith("Adam") else {}
            if (fused := getattr(import_module("apex.optimizers"), _APEX[self.cls], None)) is not None:
                makers["apex"] = self._maker(fused, **decoupled)
        return makers

    def _maker(self, cls: Any, **more: Any) -> Maker:
        def make(parameters: Sequence[Tensor], lr: float) -> Callable[[], Any]:
            step: Callable[[], Any] = cls(parameters, lr=lr, **self.arguments, **more).step
            return step

        return make

    def _compiled(self, maker: Maker) -> Maker:
        return lambda parameters, lr: torch.compile(maker(parameters, lr))

    def peers(self) -> dict[str, Any]:
        return {name: make for name, make in self.contestants().items() if name in ("for_loop", "fused", "apex")}


@dataclass(frozen=True)
class StepCase(NamedCase):
    """An optimizer on a list of parameters; ``size`` names the network that they are of."""

    operation: StepOperation
    dtype: torch.dtype
    size: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))

    def budget(self, direction: str = "step") -> float:
        from fusednn.kernels.functions.optimizer import ALGORITHMS

        return ALGORITHMS[self.operation.algorithm].budget(self.numel, self.dtype)

    def contestants(self, usual: tuple[str, ...]) -> tuple[str, ...]:
        """Who takes part: of the usual ones those that have a step of their own, and peers that are installed."""
        peers = self.operation.peers()
        return tuple(name for name in self.operation.contestants() if name in usual or name in peers)

    def record(self, contestant: str) -> dict[str, Any]:
        return {
            **self.named(contestant, "step", (len(self.shapes), self.numel)),
            "channels_last": False,
            "budget_bytes": self.budget(),
            "operations": 0,
        }

    def parameters(self, device: torch.device, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Random parameters with gradients, the same in every type."""
        generator = torch.Generator(device).manual_seed(0)
        parameters = []
        for shape in self.shapes:
            weight, gradient = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
            weight, gradient = (tensor.to(self.dtype).to(dtype or self.dtype) for tensor in (weight, gradient))
            weight.grad = gradient
            parameters.append(weight)
        return parameters


def check_step(case: StepCase, make: Maker, device: torch.device) -> float:
    """Two steps on a few of the parameters, against stock's for-loop in float64.

    Returns the worst error in epsilons of the dtype; raises WrongResultError where it is too large.
    """
    few = sorted(case.shapes, key=math.prod)
    small = StepCase(case.operation, case.dtype, case.size, (*few[:4], few[len(few) // 2]))
    ours, exact = small.parameters(device), small.parameters(device, torch.float64)
    lr = case.operation.checked_lr
    for step in (make(ours, lr), case.operation.contestants()["for_loop"](exact, lr)):
        step()
        step()
    epsilon = torch.finfo(case.dtype).eps
    worst = max(
        float(((a.double() - b).abs() / (1 + b.abs())).max()) / epsilon for a, b in zip(ours, exact, strict=True)
    )
    if not worst <= _LIMIT[case.dtype]:  # NaN fails too
        raise WrongResultError(f"{case.id}: {worst:.3g} epsilons from the for-loop in float64")
    return worst


def run_step_contest(case: StepCase, timer: DeviceTimer, names: tuple[str, ...], effort: Effort) -> Contest:
    """Check and time each contestant, one after another: state for all of them wouldn't fit together.

    Parameters, gradients and state together far exceed the L2, so that a step always begins with cold caches.
    """
    contest = Contest()
    torch._dynamo.reset()
    makers = case.operation.contestants()
    for name in names:
        make = makers[name]
        try:
            error = check_step(case, make, DEVICE)
            contest.records.append({**case.record(name), "error_epsilons": error, **_time(case, make, timer, effort)})
        except Exception as failure:
            contest.leave_out(name, failure)
        gc.collect()
        torch.cuda.empty_cache()
    return contest


def _time(case: StepCase, make: Maker, timer: DeviceTimer, effort: Effort) -> dict[str, Any]:
    step = make(case.parameters(DEVICE), _LR)
    torch.cuda.synchronize()
    step()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    for _ in range(effort.warmup_rounds):
        timer.sample(lambda: [step] * 4)
    samples = [sample for _ in range(effort.large_rounds) for sample in timer.sample(lambda: [step] * 4)]
    host: list[float] = []
    wall: list[float] = []
    for _ in range(effort.host_rounds if case.size in _HOST_SIZES else 0):
        host += host_times(lambda: [step] * 4, torch.cuda.synchronize)
        wall += wall_times(lambda: [step] * 4, torch.cuda.synchronize)
    return {
        "device_us": samples,
        "host_us": host,
        "wall_us": wall,
        "calls_per_sample": 1,
        "sets": 1,
        "rotated_bytes": case.budget(),
        "peak_bytes": peak,
        "kept_bytes": 0,
        **_path(step),
    }


def _path(step: Any) -> dict[str, str]:
    """Whether fusednn took its kernel or stock's step."""
    from fusednn import optim

    optimizer = getattr(step, "__self__", None)
    if not isinstance(optimizer, optim.FusedOptimizer):
        return {}
    return {"path": "; ".join(f"{group.path}: {group.reason}" for group in optim.explain(optimizer))}


def count_step_case(case: StepCase, *, checked: bool = True) -> list[dict[str, Any]]:
    """Records of fusednn and eager, of a step that isn't the first; after checking fusednn's result, where that isn't
    left out.

    Eager's ATen operators count as one launch each.
    """
    from fusednn.instruments.traffic import measure_traffic

    device = torch.device("cpu")
    makers = case.operation.contestants()
    errors = {"error_epsilons": check_step(case, makers["fusednn"], device)} if checked else {}
    records = []
    for name in ("fusednn", "eager"):
        step = makers[name](case.parameters(device), _LR)
        step()
        with measure_traffic() as traffic:
            step()
        records.append(
            {
                **case.record(name),
                "elements": case.numel,
                **counts_of(traffic),
                **(errors if name == "fusednn" else {}),
            }
        )
    return records


def eager_step_work(case: StepCase) -> Work:
    """What eager PyTorch does in a step that isn't the first, without doing it."""
    from fusednn.instruments.traffic import measure_traffic

    with FakeTensorMode():
        step = case.operation.contestants()["eager"](case.parameters(torch.device("cpu")), 1e-3)
        step()
        with measure_traffic() as traffic:
            step()
    return Work(traffic.aten_bytes, 0)
