"""Who takes part in a comparison: copies of a model, each with an optimizer of its own, and their training steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from .. import optim
from ..layers import ReplacementReport, replace_layers

__all__ = ["Contestant", "Task", "contestants", "exact_copy", "without_dropout"]

SEED = 0


@dataclass(frozen=True)
class Task:
    """What is trained on: batches, and the loss of a result.

    ``make_batch`` is called with the number of the step, if it takes one, after the generators were seeded with it; or
    it is the batch of every step.
    """

    make_batch: Any
    loss: Callable[..., Tensor] | None
    make_optimizer: Callable[[Any], torch.optim.Optimizer]

    def batch(self, step: int) -> Any:
        """A copy: what a model does to its input isn't seen by the others."""
        torch.manual_seed(SEED + step)
        made = self.make_batch
        if callable(made):
            made = made(step) if inspect.signature(made).parameters else made()
        return tree_map_only(Tensor, _copied, made)

    def forward(self, model: Callable[..., Any], batch: Any, step: int) -> tuple[Any, Tensor]:
        """The model's result, and the loss of it, a scalar."""
        torch.manual_seed(SEED + step)
        if self.loss is not None and not isinstance(batch, (tuple, list)):
            raise TypeError(
                "with a loss a batch is a tuple: the model's input, and what the loss gets beside the result"
            )
        inputs, target = (batch[0], batch[1:]) if self.loss is not None else (batch, ())
        result = _called(model, inputs)
        return result, _scalar(result) if self.loss is None else self.loss(result, *target)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _called(model: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _scalar(result: Any) -> Tensor:
    """The loss that a model returns itself, as transformers' do; else something that every element matters to."""
    loss = getattr(result, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    tensors = [leaf for leaf in _leaves(result) if leaf.is_floating_point() and leaf.requires_grad]
    if not tensors:
        raise ValueError("the model's result has no gradients: give compare() a loss")
    if len(tensors) == 1 and tensors[0].dim() == 0:
        return tensors[0]
    return torch.stack([tensor.float().square().mean() for tensor in tensors]).sum()


def _leaves(result: Any) -> list[Tensor]:
    values = result.to_tuple() if hasattr(result, "to_tuple") else result
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Contestant:
    """A copy of the model, ready to be trained."""

    def __init__(self, name: str, model: nn.Module, task: Task) -> None:
        self.name, self.model, self.task = name, model, task
        self.call: Callable[..., Any] = model
        self.watchable = True  # compiled code calls no hooks
        self.optimizer = task.make_optimizer([p for p in model.parameters() if p.requires_grad])

    def compiled(self) -> Contestant:
        self.call, self.watchable = torch.compile(self.model), False
        return self

    def forward(self, batch: Any, step: int) -> tuple[list[Tensor], Tensor]:
        """The tensors of the result, and the loss."""
        result, loss = self.task.forward(self.call, batch, step)
        return _leaves(result), loss

    def step(self, step: int) -> tuple[list[Tensor], Tensor]:
        results, loss = self.forward(self.task.batch(step), step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return results, loss

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


def contestants(
    model: nn.Module, task: Task, names: Sequence[str], prepare: Callable[[nn.Module], nn.Module] = lambda model: model
) -> tuple[dict[str, Contestant], dict[str, ReplacementReport]]:
    """Stock, replaced and fused copies of a model; and what replacing them said."""
    found, reports = {}, {}
    for name in names:
        copy = prepare(deepcopy(model))
        if name != "stock":
            reports[name] = replace_layers(copy, fuse=name == "fused")
        found[name] = Contestant(name, copy, task)
        if name == "fused":
            _fuse_optimizer(found[name])
    return found, reports


def _fuse_optimizer(contestant: Contestant) -> None:
    """Its twin's step, where it has a twin."""
    try:
        optim.replace(contestant.optimizer)
    except (TypeError, ValueError):
        return


def exact_copy(model: nn.Module, task: Task) -> Contestant | None:
    """A stock copy in float64, or None where it doesn't run so."""
    copy = deepcopy(model).double()

    def make_batch(step: int) -> Any:
        return tree_map(_double, task.batch(step))

    exact = Task(make_batch, task.loss, task.make_optimizer)
    contestant = Contestant("float64", copy, exact)
    try:
        contestant.forward(exact.batch(0), 0)
    except Exception:  # whatever in the model insists on another dtype
        return None
    return contestant


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def without_dropout(model: nn.Module) -> nn.Module:
    """Turn dropout layers off: ours draw other numbers than stock's."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
    return model
