"""Results that are made again in the backward pass instead of being kept for it.

Batch norm keeps its input for its own gradient, GELU its input, dropout a seed; their result is kept a second time, by
whatever consumes it.  Inside `recompute` such a consumer (a convolution, a product, attention, anybody's own function)
keeps a recipe in its place: how the result is made of what is kept anyway, in one pass over memory and with the same
bits.

A recipe is found where something is saved, by PyTorch's hooks of saved tensors: the tensor's ``grad_fn`` is the node
that made it, and what that node has saved are handles of ours.  So nothing is looked up by address, a value that was
changed since is another node's or has another version, and nothing is done at all outside `recompute`.  There are two
kinds of handles: `Kept`, a tensor, and `Recipe`.  A recipe's operands are handles; those that its node doesn't save
itself are noted by `needs` where it runs.

A `torch.autograd.Function` takes part by a static method ``recipe(ctx)``.  It returns a function of the tensors that it
saved and of those that it `needs`, in this order, which makes the result again; or None where there is none.  Where it
takes but some of those that were saved, ``recipe_takes`` are their places.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .dispatch import PLAIN_TYPES, keeping_little, transform_refusal
from .handles import Handle, Kept, Recipe, Result, View, mark, marked, note, noted
from .stock_recipes import STOCK_RECIPES

__all__ = ["DEPTH", "decides", "needs", "observe_saved", "only_watches", "reason_to_keep", "recompute"]

#: How many results are made of one another, where nobody says.
DEPTH = 3

# --- What is saved ----------------------------------------------------------------------------------------------------


class Region:
    """One `recompute`: what becomes of a tensor that is saved there."""

    def __init__(self, model: nn.Module | None, depth: int, recast_parameters: bool) -> None:
        self.depth, self._recasts = depth, recast_parameters
        norms = [] if model is None else [module for module in model.modules() if type(module).forward in _NORMS]
        self._norms = _by_weight(norms)
        # Their results may be copied before anybody saves them.
        self._watched = [norm.register_forward_hook(self._mark) for norm in norms]
        # What nodes don't save, but make their result of.
        self._needed: weakref.WeakKeyDictionary[Any, list[Handle | None] | None] = weakref.WeakKeyDictionary()
        # FSDP takes parameters' memory away behind their layers, and fetches it for these layers' own backward pass.
        self._shards = torch.distributed.is_available() and torch.distributed.is_initialized()
        outer = _top_hooks()
        self._watch: Callable[[Tensor], Any] | None = None if outer is None else outer[0]

    def pack(self, tensor: Tensor) -> Handle:
        """The handle of a tensor that is being saved."""
        whole = tensor._base if tensor._is_view() else tensor
        handle: Handle
        if whole is None or (node := whole.grad_fn) is None or not _is_alike(tensor, whole):
            handle = Kept(tensor)
        else:
            found = self._find(whole, node)
            if found is None:
                found = Kept(whole)
                note(node, whole.output_nr, found)
            elif isinstance(found, Recipe):
                found.shares += 1
            handle = found if whole is tensor else View(found, tensor)
        if self._watch is not None or _observers:
            again = handle.depth >= 0
            if self._watch is not None and not again:
                self._watch(tensor)
            for observer in _observers:
                observer(tensor, again)
        return handle

    def _find(self, tensor: Tensor, node: Any) -> Kept | Recipe | None:
        """The handle of a node's output, no view, where it is kept anyway or can be made again."""
        output = tensor.output_nr
        handle = noted(node, output)
        if handle is None or handle.version != tensor._version:
            handle = self._recipe(node, Result(tensor)) if _has_recipe(node) and _is_fresh(tensor) else None
            if handle is not None:
                note(node, output, handle)
        return handle

    def find_output(self, node: Any, output: int) -> Kept | Recipe | None:
        """Likewise of a node's output that is out of reach: where it is unchanged since it was noted or marked."""
        handle = noted(node, output)
        if handle is None and (result := marked(node, output)) is not None:
            handle = self._recipe(node, result)
            if handle is not None:
                note(node, output, handle)
        return None if handle is None or handle.changed else handle

    def need(self, ctx: Any, tensors: Sequence[Tensor | None]) -> None:
        found = [None if tensor is None else self._operand(tensor) for tensor in tensors]
        there = len(found) - found.count(None) == sum([tensor is not None for tensor in tensors])
        ctx.has_needs = True
        self._needed[ctx] = found if there else None

    def norm_of(self, weight: Handle | None) -> Any:
        """The layer or RMS norm of the model that has this weight, or None."""
        return self._norms.get(id(weight.tensor)) if isinstance(weight, Kept) else None

    def parameter(self, node: Any) -> Kept | None:
        """The handle of a parameter, where its copies aren't kept."""
        return Kept(node.variable) if self._recasts and hasattr(node, "variable") else None

    def close(self) -> None:
        self._needed.clear()
        for watched in self._watched:
            watched.remove()

    def _mark(self, _: nn.Module, __: Any, result: Any) -> None:
        if torch.compiler.is_compiling() or _here.region is not self:
            return
        if isinstance(result, Tensor) and result.grad_fn is not None and _is_fresh(result):
            mark(result)

    def _operand(self, tensor: Tensor) -> Handle | None:
        if tensor.grad_fn is None:
            return Kept(tensor) if isinstance(tensor, nn.Parameter) or tensor.dim() < 2 else None
        whole = tensor._base if tensor._is_view() else tensor
        if whole is None or (node := whole.grad_fn) is None or not _is_alike(tensor, whole):
            return None
        found = self._find(whole, node)
        return found if found is None or whole is tensor else View(found, tensor)

    def _recipe(self, node: Any, result: Result) -> Recipe | None:
        kind: Any = type(node)
        find: Any = _recipe_of(kind)
        try:
            found = find(node, self, result)
        except RuntimeError:  # its backward pass has been, and what it saved is gone
            return None
        if found is None:
            return None
        again, operands = found
        depth = max([operand.depth for operand in operands if operand is not None], default=-1)
        if depth >= self.depth or (self._shards and any(map(_is_gone, operands))):
            return None
        return Recipe(result, again, operands, depth + 1)

    def of_function(self, node: Any) -> tuple[Callable[..., Tensor], Sequence[Handle | None]] | None:
        """The recipe of a `torch.autograd.Function`, and its operands."""
        again = node._forward_cls.recipe(node)
        if again is None:
            return None
        saved = [raw.data for raw in node._raw_saved_tensors]
        if (takes := getattr(node._forward_cls, "recipe_takes", None)) is not None:
            saved = [saved[index] for index in takes]
        needed = self._needed.get(node) if hasattr(node, "has_needs") else ()
        # What was saved where other hooks were, or none, isn't ours to look at.
        if needed is None or not (any(saved) or needed) or not _HANDLES.issuperset(map(type, saved)):
            return None
        return again, (*saved, *needed)


@functools.cache
def _recipe_of(kind: Any) -> Callable[[Any, Region, Result], Any] | None:
    """What finds the recipe of a node of this class."""
    function = getattr(kind, "_forward_cls", None)
    if function is None:
        return STOCK_RECIPES.get(kind.__name__)
    return (lambda node, region, _: region.of_function(node)) if hasattr(function, "recipe") else None


_HANDLES = frozenset((Kept, Recipe, View, type(None)))


def _has_recipe(node: Any) -> bool:
    kind: Any = type(node)
    return _recipe_of(kind) is not None


def _is_fresh(tensor: Tensor) -> bool:
    """Whether this is its node's only or first result, as that made it."""
    plain = type(tensor) in PLAIN_TYPES and tensor.layout is torch.strided
    return plain and tensor.output_nr == 0 and tensor._version == 0


def _is_alike(tensor: Tensor, whole: Tensor) -> bool:
    """Whether strides and an offset make the one of the other."""
    return tensor is whole or (
        tensor.dtype == whole.dtype and tensor.layout is torch.strided and not (tensor.is_neg() or tensor.is_conj())
    )


_NORMS = (nn.LayerNorm.forward, nn.RMSNorm.forward)


def _by_weight(norms: Sequence[nn.Module]) -> dict[int, nn.Module | None]:
    """Layer and RMS norms by the identity of their weights; None where several share one."""
    found: dict[int, nn.Module | None] = {}
    for norm in norms:
        weight = id(norm.weight)
        found[weight] = None if weight in found else norm
    return found


def _is_gone(operand: Handle | None) -> bool:
    """Whether a parameter has lost its memory already: it may not be back when a consumer asks."""
    if not isinstance(operand, Kept) or not isinstance(operand.tensor, nn.Parameter):
        return False
    return operand.tensor.untyped_storage().nbytes() == 0


_unpack = methodcaller("get")


# --- Regions ----------------------------------------------------------------------------------------------------------


class _Here(threading.local):
    region: Region | None = None


_here = _Here()
_observers: list[Callable[[Tensor, bool], None]] = []


@contextmanager
def recompute(model: nn.Module | None = None, *, depth: int = DEPTH, recast_parameters: bool = False) -> Iterator[None]:
    """Keep less of a forward pass, and make results again in the backward pass, which gives the same bits.

    Around a forward pass::

        with fusednn.recompute(model):
            loss = loss_fn(model(x), target)
        loss.backward()

    What was made, by a kernel of ours or an operator of PyTorch's that costs one pass over memory, of tensors that are
    kept anyway isn't kept for those who consume it, but made again for them.  It pays where activations, norms and
    dropout lie between products, and costs one pass over memory for each result that isn't kept.  Kernels take small
    tensors here, too, since they keep less.

    ``model`` is asked for the ``eps`` of its LayerNorms and RMSNorms, of which PyTorch's graph doesn't know: without it
    their results are kept.  ``depth`` says how many results may be made of one another to make one: with residuals, 0
    keeps every second block's result, 3 every fifth.  With ``recast_parameters`` the copies that autocast makes of
    parameters aren't kept, either: a parameter may then not be changed before the backward pass.

    Changes in place raise where they do without it.  Nothing is done where nothing would be saved (``no_grad``), in
    compiled code, whose compiler decides what is kept, inside of transforms and tracers, and where others have hooks on
    saved tensors (`torch.utils.checkpoint`, `torch.autograd.graph.save_on_cpu`): theirs are served, and inside of
    theirs they decide alone.
    """
    if torch.compiler.is_compiling() or reason_to_keep() is not None:
        yield
        return
    outer, region = _here.region, Region(model, depth, recast_parameters)
    with saved_tensors_hooks(region.pack, _unpack), keeping_little():
        _here.region = region
        try:
            yield
        finally:
            _here.region = outer
            region.close()


def reason_to_keep() -> str | None:
    """Why `recompute` would do nothing here, or None."""
    if not torch.is_grad_enabled():
        return "no gradients are computed"
    if torch.compiler.is_compiling():
        return "compiled: the compiler decides what is kept"
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return "hooks of saved tensors are disabled"
    top = _top_hooks()
    if top is not None and isinstance(getattr(top[0], "__self__", None), Region):
        return "inside of another recompute"
    if top is not None and not hasattr(top[0], _WATCHES):
        return "others have hooks on saved tensors"
    return transform_refusal()


def _top_hooks() -> Any:
    """The pair of hooks that would be asked about a saved tensor, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def needs(ctx: Any, *tensors: Tensor | None) -> None:
    """Note what a result is made of besides what its node saves, in the node's forward pass.

    Such an operand is there in the backward pass if somebody else keeps it, or if it can be made again.
    """
    if not torch.compiler.is_compiling() and (region := _here.region) is not None:
        region.need(ctx, tensors)


def decides() -> bool:
    """Whether `recompute` decides here what is kept, and not a compiler or hooks of others inside of it.

    A node may leave out there what its recipe makes besides its result: it is made again before its own gradient asks,
    by a consumer's, or else by itself.
    """
    region = None if torch.compiler.is_compiling() else _here.region
    return region is not None and (top := _top_hooks()) is not None and getattr(top[0], "__self__", None) is region


_WATCHES = "_fusednn_watches"


def only_watches(pack: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Mark a pack hook that returns what it is given: inside of it `recompute` tells it what is kept."""
    setattr(pack, _WATCHES, True)
    return pack


@contextmanager
def observe_saved(observer: Callable[[Tensor, bool], None]) -> Iterator[None]:
    """Call ``observer`` with every tensor that is saved under `recompute`, and whether it is made again."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
