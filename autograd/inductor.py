"""What Inductor will make of the graph that Dynamo traces, as far as it can be told before."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["divides", "divides_channels", "turns_images"]

#: Inductor divides a channel's values among programs where channels are few and large, and reads them twice then; else
#: a program owns a channel, and has it in registers or in the cache when it reads it again.
_MOST_CHANNELS, _MOST_UNDIVIDED = 64, 8192

#: Channels of convolutions that leave images as they are (`torch._inductor.graph.GraphLowering.decide_layout_opt`).
_FEW_CHANNELS = 64


def divides_channels(input: Tensor) -> bool:
    """Whether batch norm's statistics and its normalisation both read the input from memory."""
    return input.dim() > 1 and divides(input.shape[1], input.numel())


def divides(channels: int, numel: int) -> bool:
    """Whether sums over each channel of so many elements are made in parts, which another launch adds up."""
    return channels <= _MOST_CHANNELS and numel > _MOST_UNDIVIDED * channels


def turns_images(images: Tensor, model: nn.Module | None) -> bool:
    """Whether these images, of which the trace knows channels first, will have channels last.

    Kernels that keep codes of images want them as they were traced: Inductor copies them back, and forth again behind
    the kernels.  It decides for a graph as a whole, by its convolutions: those of ``model``, or of the modules
    that are compiled.
    """
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(images.dim())
    if order is not None and images.is_contiguous(memory_format=order):
        return False
    return _turns(model) if model is not None else _turns_what_is_compiled()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _turns_what_is_compiled() -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    scope = InstructionTranslator.current_tx().output.local_scope
    return _turns(*(value for value in scope.values() if isinstance(value, nn.Module)))


def _turns(*models: nn.Module) -> bool:
    if not models:  # functions alone: anything may follow
        return True
    weights = [conv.weight for conv in _convolutions(*models)]
    grouped = any(conv.groups > 1 and conv.in_channels > conv.groups for conv in _convolutions(*models))
    narrowing = any(2 * w.shape[0] <= w.shape[1] and w.dim() > 3 and w.shape[2] > 1 for w in weights)
    few = all(max(w.shape[:2]) <= _FEW_CHANNELS for w in weights)
    return not (grouped or narrowing or few)


def _convolutions(*models: nn.Module) -> Iterator[_ConvNd]:
    return (module for model in models for module in model.modules() if isinstance(module, _ConvNd))
