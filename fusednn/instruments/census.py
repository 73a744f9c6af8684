"""What a forward pass keeps for its backward pass, layer by layer, the largest first, and what would keep less."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import kernels
from ..autograd.recompute import observe_saved, only_watches, recompute
from ..benchmark.counting import operators_of_cuda
from ..layers.fusion.host import recomputes
from ..layers.fusion.members import observe_chains, observe_modules
from ..layers.replacement.explain import leaving_no_trace
from ..layers.table import format_table
from ..layers.twin import Layer
from .launches import count_launches

__all__ = ["Census", "CensusRow", "census", "maker_of", "saved_by_layer"]

_MADE_BY_LAYERS = ("statistics", "masks, codes and seeds")
_COPY_OF_INPUT = "copy of an input"


@dataclass(frozen=True)
class CensusRow:
    """Memory that a layer (by its name in the model) keeps first: what made it, of which dtype and how much.

    Layers that are computed together are the first of them.  ``maker`` is an operator by its name in autograd's graph,
    or ``statistics``, ``masks, codes and seeds``, or ``copy of an input``.  ``remedy`` says what would keep less, and
    what else that changes.
    """

    name: str
    layer: str
    maker: str
    dtype: torch.dtype
    bytes: int
    remedy: str = ""


@dataclass(frozen=True)
class Census:
    """What is kept beside parameters, buffers and inputs, the largest first; prints as a table.

    ``made_again``: bytes that aren't kept, since they are made again; of a model where none are, ``recomputed`` is what
    would be kept if they were.
    """

    rows: tuple[CensusRow, ...]
    made_again: int
    recomputed: int | None

    def __iter__(self) -> Iterator[CensusRow]:
        return iter(self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        total = self.bytes
        rows = []
        for row in self.rows:
            who = (row.name or "(model)", row.layer, row.maker, str(row.dtype).removeprefix("torch."))
            rows.append((*who, str(row.bytes), f"{row.bytes / total:.2f}", row.remedy))
        head = ("layer", "class", "made by", "dtype", "bytes", "of all", "what would keep less; what else that changes")
        text = f"{format_table(head, rows)}\n{total} bytes kept for the backward pass"
        if self.recomputed is not None:
            return f"{text}, {self.recomputed} with recompute=True, which costs a pass over memory"
        return f"{text}, {self.made_again} made again"


def census(model: nn.Module, *inputs: Any, **kwargs: Any) -> Census:
    """Run ``model(*inputs, **kwargs)`` once or twice, and tell what it keeps for its backward pass.

    The pass leaves no trace: buffers and the random generators are put back, and no gradients are computed.  It runs in
    the mode that the model is in, and under the caller's autocast.  Without a GPU it tells what one would keep: kernels
    are counted, and not run.
    """
    tensors = [leaf for leaf in tree_leaves((inputs, kwargs)) if isinstance(leaf, Tensor)]
    on_cpu = not any(tensor.is_cuda for tensor in (*tensors, *model.parameters()))
    again: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no other comes to lie in its place

    def observe(tensor: Tensor, made_again: bool) -> None:
        if made_again:
            alive.append(tensor.detach())
            again[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    def kept(*, remade: bool) -> list[CensusRow]:
        with ExitStack() as stack:
            stack.enter_context(leaving_no_trace(model))
            if on_cpu:
                stack.enter_context(operators_of_cuda())
                if kernels.AVAILABLE and not kernels.INTERPRETING:
                    stack.enter_context(count_launches())
            rows = stack.enter_context(saved_by_layer(model, tensors))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(observe_saved(observe))
            if remade:
                stack.enter_context(recompute(model))
            model(*inputs, **kwargs)
        return rows

    rows = tuple(sorted(_merged(kept(remade=False)), key=lambda row: -row.bytes))
    made_again = sum(again.values())
    recomputed = None if recomputes(model) else sum(row.bytes for row in kept(remade=True))
    return Census(rows, made_again, recomputed)


@contextmanager
def saved_by_layer(model: nn.Module, others: Iterable[Tensor]) -> Iterator[list[CensusRow]]:
    """Rows of distinct memory that is saved in the ``with`` block, beside that of the model and of ``others``.

    What is saved outside of the model's layers has no name and no class.
    """
    names = {module: name for name, module in model.named_modules()}
    running: list[nn.Module] = []
    rows: list[CensusRow] = []
    inputs = [other for other in others if _is_plain(other)]
    shapes = {given.shape for given in inputs}
    known = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*model.parameters(), *model.buffers(), *inputs)
        if _is_plain(tensor)
    }
    alive: list[Tensor] = []  # so that no other comes to lie in its place

    @only_watches
    def pack(tensor: Tensor) -> Tensor:
        if _is_plain(tensor) and (address := tensor.untyped_storage().data_ptr()) not in known:
            known.add(address)
            alive.append(tensor.detach())
            layer = running[-1] if running else None
            name, cls = ("", "") if layer is None else (names[layer], type(layer).__name__)
            maker = maker_of(tensor)
            if maker == _MADE_BY_LAYERS[0] and tensor.shape in shapes:
                maker = _COPY_OF_INPUT
            size = tensor.untyped_storage().nbytes()
            rows.append(CensusRow(name, cls, maker, tensor.dtype, size, _remedy(maker, tensor, layer)))
        return tensor

    def enter(module: nn.Module, _: Any) -> None:
        if module in names:
            running.append(module)

    def leave(module: nn.Module, _: Any) -> None:
        if module in names:
            running.pop()

    def observe_chain(layers: Sequence[nn.Module], refusal: str | None) -> None:
        if layers and refusal is None:
            running.append(layers[0])
        elif not layers:
            running.pop()

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        observe_modules(enter, leave),
        observe_chains(observe_chain),
    ):
        yield rows
    alive.clear()


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided


def _merged(rows: Iterable[CensusRow]) -> list[CensusRow]:
    """One row for what differs in its size alone."""
    alike: dict[CensusRow, int] = {}
    for row in rows:
        key = replace(row, bytes=0)
        alike[key] = alike.get(key, 0) + row.bytes
    return [replace(key, bytes=size) for key, size in alike.items()]


# --- What made a tensor -----------------------------------------------------------------------------------------------


def maker_of(tensor: Tensor) -> str:
    """The operator that made a tensor, by its name in autograd's graph; else what a layer made for itself."""
    node = _node_of(tensor)
    if node is not None:
        return re.sub("Backward[0-9]*$", "", node.name())
    return _MADE_BY_LAYERS[not tensor.is_floating_point()]


def _node_of(tensor: Tensor) -> Any:
    """Of what made a tensor, views apart."""
    whole = tensor._base if tensor._is_view() else tensor
    node: Any = None if whole is None else whole.grad_fn
    while node is not None and re.search("View|Transpose|TBackward", node.name()):
        node = node.next_functions[0][0]
    return node


def _remedy(maker: str, tensor: Tensor, layer: nn.Module | None) -> str:
    """What would keep less than this tensor, where there is something, and what that changes."""
    node, replaced = _node_of(tensor), isinstance(layer, Layer)
    if maker == _COPY_OF_INPUT:
        return "give the batch in this dtype; no bit"
    if maker == "ToCopy":
        if hasattr(node.next_functions[0][0], "variable"):
            return "recast_parameters=True; no parameter may change before the backward pass"
        return "parameters of this dtype, float32 masters in fusednn.optim; their gradients are rounded to it"
    if node is None and tensor.dtype is torch.bool and not replaced:
        return "replace_layers: a seed or bits in place of bytes; other random numbers"
    if node is None and tensor.dtype is torch.int64 and tensor.dim() > 2 and not replaced:
        return "replace_layers: a code of bits in place of an index; no bit"
    return ""
