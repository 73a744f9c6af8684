"""Folding evaluated batch norms into the convolution or linear layer before them, for inference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from ...autograd.activation import resolve_activation
from ...autograd.batch_norm import apply_activation
from ..batch_norm import Activated
from ..twin import TWINS, Twin
from .report import ReplacementReport, ReplacementRow

__all__ = ["FoldedBatchNorm", "fold_batch_norm"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
#: Batch norms, alone and with an activation.
_NORMS = (_BatchNorm, Activated)
_FOLDED = "folded into the layer before it"


class FoldedBatchNorm(nn.Module):
    """What is left of a batch norm after folding: activation(x + residual), or x itself.

    Raises ValueError where the input hasn't ``dims`` dimensions: the batch norm would have raised too, or would have
    taken another dimension for the channels than the layer that it is folded into.
    """

    def __init__(self, dims: int, activation: str | None = None, activation_parameters: Sequence[float] = ()) -> None:
        super().__init__()
        self.dims = dims
        self.activation = activation
        self.activation_parameters = tuple(activation_parameters)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if input.dim() != self.dims:
            raise ValueError(f"expected {self.dims}D input (got {input.dim()}D input)")
        return apply_activation(input, residual, resolve_activation(self.activation, self.activation_parameters))

    def extra_repr(self) -> str:
        parameters = f", activation_parameters={self.activation_parameters}" if self.activation_parameters else ""
        return f"dims={self.dims}, activation={self.activation!r}{parameters}"


def fold_batch_norm(model: nn.Module) -> ReplacementReport:
    """Fold every batch norm of ``model`` that follows a convolution or linear layer into it, in place.

    With s = weight / sqrt(running_var + eps), the layer's weight becomes s * weight, and its bias
    s * (layer's bias - running_mean) + bias; a `FoldedBatchNorm` takes the batch norm's place, with the activation of a
    fused one.  The model then gives the same values in evaluation, without the batch norm's pass over memory; it can't
    be trained as before.

    Which layer comes before is read off the model's graph (``torch.fx``); where a module's code can't be traced, its
    children are, each by itself.  Both layers have to be in evaluation, called once, and used by nothing else, and
    neither may have hooks or parametrizations.

    Returns:
        A report with a row per batch norm: folded or left, and why.
    """
    uses = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    names = {module: name for name, module in model.named_modules()}
    of_others = {module.bn for module in names if isinstance(module, Activated)}
    norms = [module for module in names if isinstance(module, _NORMS) and module not in of_others]
    reasons: dict[nn.Module, str] = {}
    for root, graph in _traceable_parts(model):
        calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        for node in graph.nodes:
            if node.op != "call_module" or not isinstance(norm := root.get_submodule(node.target), _NORMS):
                continue
            before = node.args[0] if node.args else None
            layer, once = None, False
            if isinstance(before, fx.Node) and before.op == "call_module":
                layer = root.get_submodule(str(before.target))
                once = calls[node.target] == calls[before.target] == len(before.users) == 1
            reason = _reason_to_leave(norm, layer, uses)
            if reason is None and not once:
                reason = "it, or the output of the layer before it, is used more than once"
            reasons[norm] = reason or _FOLDED
            if reason is None and layer is not None:
                _fold(layer, _alone(norm))
                parent, _, name = names[norm].rpartition(".")
                setattr(model.get_submodule(parent), name, _remainder(norm, layer))
    rows = []
    for norm in norms:
        reason = reasons.get(norm, "not called, or the code around it can't be traced")
        rows.append(ReplacementRow((names[norm],), type(norm).__name__, reason == _FOLDED, reason))
    return ReplacementReport(rows)


class _LayerTracer(fx.Tracer):
    """Layers are leaves of the graph: PyTorch's, ours, and whatever has no children."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        childless = not any(True for _ in module.children())
        return childless or isinstance(module, Twin) or super().is_leaf_module(module, name)


def _traceable_parts(module: nn.Module) -> Iterator[tuple[nn.Module, fx.Graph]]:
    """The module with its graph, or else those of its children's parts that can be traced."""
    if not any(isinstance(child, _BatchNorm) for child in module.modules()) or isinstance(module, _NORMS):
        return
    try:
        graph = _LayerTracer().trace(module)
    except Exception:  # the module's own code may raise anything when it is given proxies
        for child in module.children():
            yield from _traceable_parts(child)
    else:
        yield module, graph


def _alone(norm: nn.Module) -> nn.Module:
    """A batch norm without the activation that it may have."""
    return norm.bn if isinstance(norm, Activated) else norm


def _reason_to_leave(norm: nn.Module, layer: nn.Module | None, uses: Counter[nn.Module]) -> str | None:
    if not (isinstance(layer, _FOLDABLE) and type(layer) in (*_FOLDABLE, *TWINS.values())):
        return "not preceded by a convolution or linear layer"
    assert layer is not None
    modules, norm = {norm, _alone(norm), layer}, _alone(norm)
    if not isinstance(norm, _BatchNorm):
        return "another layer has taken its batch norm's place"
    if not _is_plain(norm):
        return "has a forward of its own"
    if norm.training or layer.training:
        return "in training"
    if norm.running_mean is None or norm.running_var is None:
        return "has no running statistics"
    if any(uses[module] > 1 for module in modules):
        return "shared"
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return "has hooks"
    if any(parametrize.is_parametrized(module) for module in modules):
        return "parametrized"
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return None if channels == norm.num_features else "another number of channels"


def _is_plain(norm: _BatchNorm) -> bool:
    """Whether a batch norm computes what its ``torch.nn`` class does: libraries derive classes that also activate."""
    stock = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return "forward" not in norm.__dict__ and any(
        type(norm).forward is cls.forward for base in stock for cls in (base, TWINS[base])
    )


def _fold(layer: Any, norm: Any) -> None:
    with torch.no_grad():
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        zeros, ones = torch.zeros_like(mean), torch.ones_like(mean)
        scale = _double(norm.weight, ones) / (variance + norm.eps).sqrt()
        bias = (_double(layer.bias, zeros) - mean) * scale + _double(norm.bias, zeros)
        weight = layer.weight.double()
        if isinstance(layer, _TRANSPOSED):  # (in, out / groups, *)
            grouped = weight.unflatten(0, (layer.groups, -1))
            weight = (grouped * scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
        else:  # (out, ...)
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        needs_gradient = layer.weight.requires_grad
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), needs_gradient)
        layer.weight = nn.Parameter(weight.to(layer.weight), needs_gradient)


def _double(parameter: Tensor | None, default: Tensor) -> Tensor:
    return default if parameter is None else parameter.double()


def _remainder(norm: nn.Module, layer: nn.Module) -> FoldedBatchNorm:
    dims = 2 if isinstance(layer, nn.Linear) else layer.get_parameter("weight").dim()
    fused = (norm.activation, norm.activation_parameters) if isinstance(norm, Activated) else ()
    remainder = FoldedBatchNorm(dims, *fused)
    return remainder.train(norm.training)
