"""Which path each layer of a model takes, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...autograd.dispatch import Choice, judged_as_compiled, judged_as_trained, observe_choices
from ...autograd.recompute import observe_saved
from ..fusion.host import recomputes, why_apart
from ..fusion.members import observe_chains, observe_modules
from ..table import format_table
from ..twin import Layer
from .register import twin_of
from .replace import reason_to_keep_apart
from .swap import REPLACED

__all__ = ["Explanation", "ExplanationRow", "KeptRow", "explain", "leaving_no_trace"]


@dataclass(frozen=True)
class ExplanationRow:
    """One layer (by its name in the model) and the path that one of its operations took: "kernel" or "stock".

    Layers that were computed together are the first of them, and the path of the others is "fused".  The first layer of
    a chain whose layers were called one by one has the path "apart" besides, with the reason.  Of a layer that was
    called by itself in a model that runs kernels, the reason also says why its neighbours' can't take it in.
    """

    name: str
    layer: str
    operation: str
    path: str
    reason: str


@dataclass(frozen=True)
class KeptRow:
    """One layer (by its name in the model), and bytes of what it reads in the backward pass: kept, and made again.

    What several layers read is the first one's.
    """

    name: str
    layer: str
    kept: int
    made_again: int


@dataclass(frozen=True)
class Explanation:
    """A row per layer and operation, in the order of execution; prints as a table.

    ``kept`` has a row per layer of a model whose results are made again (``replace_layers(model, recompute=True)``),
    the one that keeps the most first; where none are made again there, ``recompute`` says why.
    """

    rows: tuple[ExplanationRow, ...]
    kept: tuple[KeptRow, ...] = ()
    recompute: str | None = None

    def __iter__(self) -> Iterator[ExplanationRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        body = [(row.name or "(model)", row.layer, row.operation, row.path, row.reason) for row in self.rows]
        kernels = sum(row.path == "kernel" for row in self.rows)
        table = format_table(("layer", "class", "operation", "path", "reason"), body)
        fused, apart = (sum(row.path == path for row in self.rows) for path in ("fused", "apart"))
        total = len(self.rows) - fused - apart
        text = f"{table}\n{kernels} of {total} on kernels" + (f", {fused} fused" if fused else "")
        if self.kept:
            sizes = [(row.name or "(model)", row.layer, str(row.kept), str(row.made_again)) for row in self.kept]
            kept, again = (
                sum(column) for column in zip(*((row.kept, row.made_again) for row in self.kept), strict=True)
            )
            text += f"\n\n{format_table(('layer', 'class', 'bytes kept', 'made again'), sizes)}"
            text += f"\n{kept} bytes kept for the backward pass, {again} made again"
        if self.recompute is not None:
            text += f"\nno results are made again in the backward pass: {self.recompute}"
        return text


def explain(model: nn.Module, *inputs: Any, **kwargs: Any) -> Explanation:
    """Run ``model(*inputs, **kwargs)`` once, and report the path that each layer took and why.

    The pass leaves no trace: buffers (running statistics) and the random generators are put back, and no gradients are
    computed; where the model is in training, choices are those of a training step.  It stays in the mode (training or
    evaluation) that it is in.  Of a model that `torch.compile` compiled it runs the code that was compiled, and
    reports what the compiler is given: what is kept is the compiler's choice.  Of another model whose results are made
    again it also reports what each layer keeps for the backward pass.
    """
    if compiled := hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        model = getattr(model, "_orig_mod", model)
    names = {module: name for name, module in model.named_modules()}
    running: list[nn.Module] = []
    rows: dict[ExplanationRow, None] = {}  # ordered, and a layer that is called twice alike appears once
    chose: set[nn.Module] = set()

    def observe(choice: Choice) -> None:
        if running:
            module = running[-1]
            chose.add(module)
            row = ExplanationRow(names[module], type(module).__name__, choice.operation, choice.path, choice.reason)
            rows[row] = None

    storages = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    alive: list[Tensor] = []  # so that no two of them have one address
    sizes: dict[nn.Module, list[int]] = {}

    def observe_tensor(tensor: Tensor, again: bool) -> None:
        storage = tensor.untyped_storage()
        if running and storage.data_ptr() not in storages:
            storages.add(storage.data_ptr())
            alive.append(tensor.detach())
            sizes.setdefault(running[-1], [0, 0])[again] += storage.nbytes()

    chains: list[Sequence[nn.Module]] = []
    together: set[str] = set()

    def observe_chain(layers: Sequence[nn.Module], refusal: str | None) -> None:
        if refusal is not None:
            rows[ExplanationRow(names[layers[0]], type(layers[0]).__name__, "-", "apart", refusal)] = None
        elif layers:
            together.update(names[layer] for layer in layers)
            chains.append(layers)
            running.append(layers[0])
        else:
            first, *others = chains.pop()
            running.pop()
            for other in others:
                reason = f"computed by {names[first]}"
                rows[ExplanationRow(names[other], type(other).__name__, "-", "fused", reason)] = None

    def enter(module: nn.Module, _: Any) -> None:
        if module in names:
            running.append(module)

    def leave(module: nn.Module, _: Any) -> None:
        if module not in names:
            return
        running.pop()
        if module not in chose and not any(True for _ in module.children()):
            row = ExplanationRow(names[module], type(module).__name__, "-", "stock", _why_stock(module))
            rows[row] = None

    with (
        leaving_no_trace(model),
        nullcontext() if recomputes(model) and not compiled else torch.no_grad(),
        observe_saved(observe_tensor),
        observe_choices(observe),
        observe_chains(observe_chain),
        observe_modules(enter, leave),
        _uncompiled(model) if compiled else nullcontext(),
        judged_as_trained() if model.training else nullcontext(),
    ):
        model(*inputs, **kwargs)
    # What keeps a layer itself from its kernel need not be said of its chain again.
    said = {row.reason for row in rows if row.path == "stock"}
    # Where no kernel runs at all, neighbours aren't why.
    looks = not compiled and any(row.path == "kernel" for row in rows)
    apart = {names[layer]: reason for layer, reason in _apart(model).items()} if looks else {}
    told = tuple(
        replace(row, reason=f"{row.reason}; not fused: {apart[row.name]}")
        if row.path in ("kernel", "stock") and row.name in apart.keys() - together
        else row
        for row in rows
        if row.path != "apart" or row.reason not in said
    )
    kept = [KeptRow(names[module], type(module).__name__, *size) for module, size in sizes.items()]
    kept.sort(key=lambda row: row.kept, reverse=True)
    return Explanation(told, tuple(kept), _COMPILED if compiled and recomputes(model) else None)


@contextmanager
def leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Put the model's buffers (running statistics) and the random generators back behind the ``with`` block."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    try:
        with torch.random.fork_rng(sorted(device.index for device in devices)):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


_COMPILED = "compiled: the compiler decides what is kept"


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """The compiled model runs as it was before, with the choices of the compiler."""
    with torch.compiler.set_stance("force_eager"), judged_as_compiled(model):
        yield


def _apart(model: nn.Module) -> dict[nn.Module, str]:
    """Why layers of a model that has twins aren't fused with their neighbours."""
    found: dict[nn.Module, str] = {}
    if any(REPLACED in module.__dict__ for module in model.modules()):
        for module in model.modules():
            found |= why_apart(module, lambda _, layer: reason_to_keep_apart(layer))
    return found


def _why_stock(module: nn.Module) -> str:
    if isinstance(module, Layer):
        return "called no operation"
    if twin_of(type(module)) is not None:
        return "has a twin: call fusednn.replace_layers"
    return "no fusednn twin"
