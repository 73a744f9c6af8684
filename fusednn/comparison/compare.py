"""`fusednn.compare`: is it right, is it faster, does it save memory, and if not, why; on the caller's own model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import explain
from .advice import advice
from .clock import measure
from .contestants import Task, contestants
from .memory import kept_by_layer, traffic
from .proof import prove
from .report import Comparison

__all__ = ["compare"]


def compare(
    model: nn.Module,
    make_batch: Any,
    loss: Callable[..., Tensor] | None = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    *,
    steps: int = 3,
    timed_steps: int = 20,
    compiled: bool = False,
    progress: Callable[[str], object] = lambda text: None,
) -> Comparison:
    """Train stock, replaced and fused copies of a model in turns, and report what is right, faster and smaller.

    Args:
        model: on the device and in the mode to compare it in.  It is copied, and stays as it is.
        make_batch: makes a batch, on the model's device; called with the number of the step, if it takes an argument.
            What can't be called is itself the batch of every step.  With ``loss`` a batch is a tuple of the model's
            input (a tensor, a tuple of arguments, or a dictionary of keywords) and what the loss gets beside the
            result; without it the model's input.
        loss: of the model's result and the rest of the batch, a scalar.  By default what the model returns: its
            ``loss``, a scalar, or else the mean square of its results.
        optimizer: makes one for parameters; its twin steps the fused copy.  SGD with momentum, by default.
        steps: after which parameters are compared.
        timed_steps: of each copy; 0 measures no times.
        compiled: also time copies under ``torch.compile``.
        progress: called with what is being done.

    Returns:
        A `Comparison`; prints as tables.

    A copy is right where its results, gradients and parameters are as near to the model's in float64 as stock's are:
    within twice its error (four times after several steps) and four roundings, by norms.  Dropout layers are off for
    that.  Where the model doesn't run in float64, copies are compared with stock.

    Raises ValueError where the model's result has no gradients and there is no ``loss``, TypeError where there is one
    and a batch isn't a tuple, and what training raises.
    """
    device = next((p.device for p in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9))
    task = Task(make_batch, loss, make_optimizer)
    with _generators_kept(device), torch.enable_grad():
        task.forward(deepcopy(model), task.batch(0), 0)  # raises what it raises, before anything is measured
        progress("results, gradients and parameters")
        proof = prove(model, task, ("stock", "replaced", "fused"), steps)
        progress("memory")
        spare, reports = contestants(model, task, ("stock", "replaced", "fused"))
        memory = {name: kept_by_layer(one, device) for name, one in spare.items()}
        counted = {name: count for name, one in spare.items() if (count := traffic(one)) is not None}
        copies, _ = contestants(model, task, tuple(spare))
        del spare
        times = {}
        if timed_steps:
            if compiled:
                others, _ = contestants(model, task, ("stock", "fused"))
                copies |= {f"{name}, compiled": one.compiled() for name, one in others.items()}
            times = measure(copies, timed_steps, device, lambda: progress("times"))
        batch = task.batch(0)
        explanation = _explained(copies["fused"].model, batch[0] if loss is not None else batch)
    told = tuple(advice(model, reports["fused"], explanation))
    return Comparison(str(device), proof, times, memory, counted, reports["fused"], explanation, told)


def _explained(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return explain(model, **inputs)
    return explain(model, *inputs) if isinstance(inputs, (tuple, list)) else explain(model, inputs)


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """Put the random generators back."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        yield
