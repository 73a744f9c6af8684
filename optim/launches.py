"""From a parameter group to kernel launches: one for each combination of device and dtypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.base.multi_tensor import CHUNK, SETTINGS, FlatOperands, Table
from ..kernels.optimizer import Penalty, Settings, Variant, launch_squares, launch_update
from .counters import Counters, Shelf, advance, one_step, relative
from .known import Known
from .options import has_master, wants
from .recipe import Group, Recipe
from .sharding import is_distributed, layout, local, sum_over_mesh

__all__ = ["Batch", "Launch", "batches", "clipped_squares"]

#: The place of the gradients among what a kernel works on.
GRADIENTS = 1


@dataclass
class Batch:
    """Parameters that one launch updates, with their gradients and state; ``fresh`` ones are in their first step."""

    parameters: list[Any] = field(default_factory=list)
    gradients: list[Any] = field(default_factory=list)
    own: list[dict[str, Any]] = field(default_factory=list)
    fresh: list[bool] = field(default_factory=list)

    def add(self, parameter: Any, own: dict[str, Any], fresh: bool) -> None:
        self.parameters.append(parameter)
        self.gradients.append(parameter.grad)
        self.own.append(own)
        self.fresh.append(fresh)

    def columns(self, group: Group, recipe: Recipe) -> list[list[Any]]:
        """What the kernel works on, in its order: parameters, gradients, states, master weights, averages."""
        keys = [*recipe.row.states, *["master"] * has_master(group, self.parameters[0])]
        keys += ["average"] * (wants(group, "averaging") is not None)
        return [self.parameters, self.gradients, *([state[key] for state in self.own] for key in keys)]


def batches(
    recipe: Recipe, parameters: Sequence[Any], state: Mapping[Any, dict[str, Any]], fresh: Sequence[bool]
) -> dict[Any, Batch]:
    """A group's parameters by what a launch has one of: device, dtypes, and distribution over processes."""
    states = recipe.row.states
    combinations: dict[Any, Batch] = {}
    for parameter, is_fresh in zip(parameters, fresh, strict=True):
        own = state.get(parameter, {})  # SGD may need none, and shall make none
        first = own[states[0]] if states else parameter
        key = (parameter.device, parameter.dtype, parameter.grad.dtype, first.dtype, layout(parameter))
        combinations.setdefault(key, Batch()).add(parameter, own, is_fresh)
    return combinations


class Launch:
    """An update that can be launched again and again: tensors laid out, and what the kernel is told of them.

    `prepare` makes one step ready: counters advanced, numbers and addresses that changed uploaded.
    """

    def __init__(self, group: Group, recipe: Recipe, batch: Batch, table: Table, *, unscales: bool) -> None:
        self._batch, self._table = batch, table
        self._clips = wants(group, "clip_norm") is not None
        self._averaged = wants(group, "averaging") is not None
        self._device = batch.parameters[0].device
        given = batch.columns(group, recipe)
        self._like = given[0][0]
        columns = [[local(tensor) for tensor in column] for column in given] if is_distributed(self._like) else given
        parameters, gradients = columns[:2]
        penalty = Penalty.GROUPS if wants(group, "group_lasso") else Penalty.NONE
        if penalty is Penalty.NONE and (wants(group, "l1") or wants(group, "l2")):
            penalty = Penalty.ELEMENTS
        self._variant = Variant(
            recipe.algorithm,
            parameters[0].dtype,
            gradients[0].dtype,
            columns[2][0].dtype if recipe.row.states else parameters[0].dtype,
            penalty,
            has_master(group, parameters[0]),
            self._averaged,
            unscales=unscales,
        )
        is_written = [i != GRADIENTS or unscales for i in range(len(columns))]  # gradients only where unscaled
        kinds = [columns] if columns is given else [columns, given]
        self._written = [
            tensor for kind in kinds for i, column in enumerate(kind) if i != GRADIENTS for tensor in column
        ]
        self._unscaled = [tensor for kind in kinds for tensor in kind[GRADIENTS]] if unscales else []
        self._tensors = len(parameters)
        self._flat = FlatOperands(parameters, rows=penalty is Penalty.GROUPS)
        self._addresses = [
            self._flat.addresses(column, written=written) for column, written in zip(columns, is_written, strict=True)
        ]
        self._extents = _extents(parameters, penalty)
        self._programs = table.programs(*self._extents[:2])
        moved = columns is not given or self._flat.copied
        self._first = bool(recipe.row.states) and any(batch.fresh)
        self._known = None if moved else Known(gradients, [*parameters, *(t for column in columns[2:] for t in column)])
        self._shelf: Shelf | None = None
        self._words = self._floats = torch.empty(0, dtype=torch.int64, device=self._device)
        batch.gradients.clear()  # which a step may outlive

    def prepare(self, group: Group, recipe: Recipe, scale: Tensor | None, found_inf: Tensor | None) -> None:
        """``scale`` and ``found_inf`` are a GradScaler's, where it leaves them to the step."""
        batch = self._batch
        found_inf = None if found_inf is None else found_inf.to(self._device, non_blocking=True)
        numbers, self._on_device = _split_numbers(
            lr=group["lr"],
            sign=-1.0 if group["maximize"] else 1.0,
            clip_norm=wants(group, "clip_norm"),
            clip_value=wants(group, "clip_value"),
            l1=wants(group, "l1"),
            l2=wants(group, "l2"),
            group_lasso=wants(group, "group_lasso"),
            average_decay=-1.0 if wants(group, "averaging") == "mean" else wants(group, "averaging"),
            scale=scale,
            found_inf=found_inf,
            **recipe.numbers(),
        )
        self._lr = numbers.pop("lr", 1.0)
        if "step" in batch.own[0]:
            counters = advance(batch.own, self._device, recipe, found_inf, self._shelf)
        else:
            counters = Counters(np.array([1.0 if is_fresh else 2.0 for is_fresh in batch.fresh]))
        self._averages = None
        if self._averaged:
            counts = [state["averages"] for state in batch.own]
            torch._foreach_add_(counts, one_step(found_inf, counts[0]))
            self._averages = torch.stack(counts).double()
        self._bases, scalars, self._scalars = relative(counters, self._tensors)
        settings = np.array(Settings(**numbers)).view(np.int64)
        rows = [settings, *self._addresses, *self._extents, *scalars, self._programs]
        words = self._table.upload(rows)
        if words is not self._words:
            self._words, self._floats = words, words.view(torch.float64)

    @property
    def is_repeatable(self) -> bool:
        """Whether another step may `follows`: not the first of a parameter, nor one that worked on copies."""
        return self._known is not None and not self._first

    def follows(self) -> bool:
        """Whether another step works on the same memory, but for the gradients', whose addresses are taken over."""
        batch = self._batch
        if self._known is None or not self._known.are_in_place():
            return False
        gradients = [parameter.grad for parameter in batch.parameters]
        addresses = self._known.addresses(gradients)
        if addresses is None:
            return False
        self._addresses[GRADIENTS] = addresses
        self._unscaled = gradients if self._variant.unscales else []
        if self._shelf is None or not self._shelf.is_in_place():
            self._shelf = Shelf.of(batch.own)
        return True

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped by the norm of all."""
        return self._clips

    def squares(self) -> Tensor:
        """Launch the sum of the gradients' squares: float64 partial sums, over all processes."""
        sums = launch_squares(
            self._words, self._variant.gradient, len(self._addresses), self._tensors, len(self._programs)
        )
        return sum_over_mesh(sums, self._like) if is_distributed(self._like) else sums

    def run(self, squares: Tensor | None) -> None:
        """Launch the update.  ``squares`` add up to those of all gradients that are clipped by their norm."""
        settings = self._floats[:SETTINGS]
        if self._on_device:
            settings = settings.clone()
            for name, value in self._on_device.items():
                settings[Settings._fields.index(name)].copy_(value.reshape(()), non_blocking=True)
        scalars = self._scalars
        if scalars is None:
            scalars = self._floats[SETTINGS + (len(self._addresses) + len(self._extents)) * self._tensors :]
        if squares is not None:
            squares = squares.to(self._device, non_blocking=True) if self._clips else None
        launch_update(
            self._variant,
            len(self._programs),
            self._words,
            settings,
            scalars,
            self._averages,
            squares,
            self._tensors,
            self._lr,
            *self._bases,
        )
        self._flat.copy_back()
        torch.autograd.graph.increment_version([*self._written, *self._unscaled])
        self._unscaled = []


def clipped_squares(launches: Sequence[Launch]) -> Tensor | None:
    """Sums that add up to that of the squares of all gradients to be clipped by their norm; None where none is."""
    partial = [launch.squares() for launch in launches if launch.clips]
    if len(partial) < 2:
        return partial[0] if partial else None
    return torch.cat([sums.to(partial[0].device, non_blocking=True) for sums in partial])


def _split_numbers(**values: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Settings by name: numbers that the host knows, and those that only the device knows.  None is left out."""
    numbers, on_device = {}, {}
    for name, value in values.items():
        if isinstance(value, Tensor) and (value.device.type != "cpu" or name in ("scale", "found_inf")):
            on_device[name] = value
        elif value is not None:
            numbers[name] = float(value)
    return numbers, on_device


def _extents(parameters: Sequence[Tensor], penalty: Penalty) -> list[Any]:
    """Elements of each parameter, how many a program takes, and how many a group has (0 where there are no groups)."""
    elements = np.array([parameter.numel() for parameter in parameters], dtype=np.int64)
    chunks = np.full_like(elements, CHUNK)
    groups = np.zeros_like(elements)
    if penalty is Penalty.GROUPS:
        for i, parameter in enumerate(parameters):
            if parameter.dim() > 1 and parameter.numel():
                chunks[i] = groups[i] = parameter.numel() // parameter.shape[0]
    return [elements, chunks, groups]
