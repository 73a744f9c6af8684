"""Whether copies of a model that compute otherwise compute the same: results, gradients, parameters, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..layers.fusion.members import observe_modules
from .contestants import Contestant, Task, contestants, exact_copy, without_dropout

__all__ = ["Finding", "Proof", "prove"]

#: Our error is at most twice stock's, but for some roundings; four times after several steps, which amplify it.
_FACTOR, _LATER_FACTOR = 2.0, 4.0
_ROUNDINGS = 4.0


@dataclass(frozen=True)
class Finding:
    """A quantity of one copy: its relative error, stock's own, and what is allowed."""

    contestant: str
    what: str
    error: float
    stock_error: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.error <= self.allowed  # not where it is NaN


@dataclass(frozen=True)
class Proof:
    """``reference`` is what results were compared with; ``blame`` names the first layer that differs, by copy."""

    reference: str
    findings: tuple[Finding, ...]
    blame: Mapping[str, str]

    @property
    def right(self) -> bool | None:
        """None where nothing could be compared."""
        return all(finding.right for finding in self.findings) if self.findings else None

    def worst(self, contestant: str) -> Finding | None:
        """What is nearest to its limit, or furthest beyond it."""
        own = [finding for finding in self.findings if finding.contestant == contestant]
        return max(own, key=lambda f: float("inf") if f.error != f.error else f.error / f.allowed, default=None)


def prove(model: nn.Module, task: Task, names: Sequence[str], steps: int) -> Proof:
    """Train copies for some steps, without dropout, and hold the others to stock's own error."""
    copies, _ = contestants(model, task, names, without_dropout)
    if _is_random(copies["stock"]):
        return Proof("nothing: the model draws random numbers besides its dropout layers'", (), {})
    exact = exact_copy(without_dropout(copies["stock"].model), task)
    kinds: dict[str, dict[str, list[Tensor]]] = {name: {} for name in (*copies, "float64")}
    for contestant in (*copies.values(), *([exact] if exact else [])):
        for step in range(steps):
            results, loss = contestant.step(step)
            if step == 0:
                gradients = contestant.gradients()
                kinds[contestant.name] |= {
                    "result": [_apart(result) for result in results if result.is_floating_point()],
                    "loss": [_apart(loss)],
                    **{f"gradient of {name}": [_apart(g)] for name, g in gradients.items()},
                }
        parameters = contestant.model.named_parameters()
        kinds[contestant.name] |= {f"{name} after {steps} steps": [_apart(p)] for name, p in parameters}
    stocks = [value for what, values in kinds["stock"].items() if what.startswith("gradient") for value in values]
    # What cancels, as the gradient of a bias before batch norm, is held to what it is a sum of.
    largest = max((float(gradient.double().norm()) for gradient in stocks), default=0.0)
    findings = [
        _compare(
            *(name, what, kinds[name].get(what, []), values, kinds["float64"].get(what)),
            largest if what.startswith("gradient") else 0.0,
        )
        for what, values in kinds["stock"].items()
        for name in copies
        if name != "stock"
    ]
    wrong = {finding.contestant for finding in findings if not finding.right}
    blame = {name: _first_that_differs(model, task, name) for name in copies if name in wrong}
    reference = "PyTorch's operators in float64" if exact else "PyTorch's operators: the model doesn't run in float64"
    return Proof(reference, tuple(findings), blame)


def _apart(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _is_random(contestant: Contestant) -> bool:
    """Whether two seeds give two results."""
    was = {name: buffer.clone() for name, buffer in contestant.model.named_buffers()}
    first, second = (contestant.forward(contestant.task.batch(0), step)[1].detach() for step in (0, 1))
    with torch.no_grad():
        for name, buffer in contestant.model.named_buffers():
            buffer.copy_(was[name])
    return not torch.equal(first, second) and bool((first - second).abs() > 1e-3 * first.abs())


def _compare(
    name: str,
    what: str,
    ours: Sequence[Tensor],
    stock: Sequence[Tensor],
    exact: Sequence[Tensor] | None,
    largest: float = 0.0,
) -> Finding:
    if [(tensor.shape, tensor.dtype) for tensor in ours] != [(tensor.shape, tensor.dtype) for tensor in stock]:
        return Finding(name, f"{what}: not of stock's shapes and dtypes", float("nan"), 0.0, 0.0)
    epsilon = max((torch.finfo(tensor.dtype).eps for tensor in stock), default=0.0)
    floor = epsilon * largest
    if exact is None:
        return Finding(name, what, _distance(ours, stock, floor), 0.0, epsilon**0.75)
    stock_error = _distance(stock, exact, floor)
    factor = _LATER_FACTOR if what.endswith("steps") else _FACTOR
    allowed = factor * stock_error + _ROUNDINGS * epsilon
    return Finding(name, what, _distance(ours, exact, floor), stock_error, allowed)


def _distance(these: Iterable[Tensor], those: Iterable[Tensor], floor: float) -> float:
    """The norm of the difference over the norm, or ``floor``; infinities and NaN count where they aren't the same."""
    apart = whole = 0.0
    for a, b in zip(these, those, strict=True):
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        apart += float(torch.where(same, 0.0, a - b).square().sum())
        whole += float(b.nan_to_num(0.0, 0.0, 0.0).square().sum())
    return float(apart**0.5 / (max(whole**0.5, floor) or 1.0))


# --- Layer by layer ---------------------------------------------------------------------------------------------------


def _first_that_differs(model: nn.Module, task: Task, name: str) -> str:
    """The first module whose result isn't as near to float64's as stock's is; forward, then by gradients."""
    copies, _ = contestants(model, task, ("stock", name), without_dropout)
    exact = exact_copy(copies["stock"].model, task)
    traces = {one.name: _trace(one) for one in (*copies.values(), *([exact] if exact else []))}
    reference = traces.get("float64", {})
    for event, ours in traces[name].items():
        stock = traces["stock"].get(event)
        if stock is not None and not _compare(name, event, ours, stock, reference.get(event)).right:
            return event
    return "none forward: a gradient"


def _trace(contestant: Contestant) -> dict[str, list[Tensor]]:
    """What modules were given and returned, in the order of events, which are named by module and call."""
    names = {module: name or "the model" for name, module in contestant.model.named_modules()}
    calls: dict[str, int] = {}
    events: dict[str, list[Tensor]] = {}

    def note(what: str, module: nn.Module, values: Any) -> None:
        if module not in names:
            return
        event = f"{what} {names[module]} ({type(module).__name__})"
        calls[event] = calls.get(event, 0) + 1
        tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point()]
        events[event if calls[event] == 1 else f"{event}, call {calls[event]}"] = [_apart(x) for x in tensors]

    with observe_modules(partial(note, "what reaches"), partial(note, "result of")):
        contestant.step(0)
    return events
