"""Turning an optimizer that exists already into its twin."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch.optim import Optimizer

from .optimizer import FusedOptimizer
from .options import check_options
from .twin import TWINS

__all__ = ["replace"]


def replace(optimizer: Optimizer, **options: Any) -> FusedOptimizer:
    """Make a ``torch.optim`` optimizer its twin, in place, and return it.

    Its parameter groups, state and hooks stay, and so does its identity: learning-rate schedulers and GradScalers that
    know it go on with it.  ``options`` are the keywords of ours that the twin is to have.

    Where one of them can't be had nothing is changed.  Raises TypeError where the optimizer's class, taken exactly, has
    no twin, or lacks an option; ValueError where ``step`` is overridden on the instance, or an option is out of its
    range.
    """
    twin = type(optimizer) if isinstance(optimizer, FusedOptimizer) else TWINS.get(type(optimizer))
    if twin is None:
        known = ", ".join(sorted(stock.__name__ for stock in TWINS))
        raise TypeError(f"{type(optimizer).__name__} has no fusednn twin; exactly these classes have: {known}")
    if unknown := [name for name in options if name not in twin.options]:
        raise TypeError(f"{twin.__name__} has no option {', '.join(unknown)}; it has: {', '.join(twin.options)}")
    check_options(options)
    for group in optimizer.param_groups:
        twin._check_group({**options, **group})
    if not isinstance(optimizer, FusedOptimizer):
        scheduled = optimizer.__dict__.get("step")
        if scheduled is not None and not hasattr(scheduled, "_wrapped_by_lr_sched"):
            raise ValueError("step is overridden on the instance, which a twin would drop: construct the twin instead")
        optimizer.__dict__.pop("step", None)
        optimizer.__class__ = twin
        optimizer._patch_step_function()
        if scheduled is not None:
            _tell_schedulers(optimizer)
    assert isinstance(optimizer, FusedOptimizer)
    optimizer._set_options(options)
    return optimizer


def _tell_schedulers(optimizer: Optimizer) -> None:
    """Note each step on the instance: schedulers check that it came before theirs, and have wrapped the old one."""
    reference = weakref.ref(optimizer)
    step = type(optimizer).step

    @functools.wraps(step)
    def noted(*arguments: Any, **keywords: Any) -> Any:
        owner = reference()
        owner._opt_called = True  # type: ignore[union-attr]
        return step(owner, *arguments, **keywords)  # type: ignore[arg-type]

    noted._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = noted  # type: ignore[method-assign]
