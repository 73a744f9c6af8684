"""What the owner of a model could change to gain more."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import nn

from ..layers import Explanation, ReplacementReport

__all__ = ["advice"]

#: By words in a reason: what would end it.
_BY_REASON = {
    "has hooks": "remove its hooks, or register them on the module around it",
    "forward is overridden on the instance": "assign no forward to the instance",
    "may override it": "register the class: fusednn.register_twin",
    "is used twice": "use its value once, or accept that it is computed apart",
    "in place": "leave out the operation in place",
    "not initialised": "run a batch through the model before replace_layers",
}
#: Words in reasons that nobody can do anything about.
_BY_DESIGN = ("no fusednn twin", "CPU", "cuDNN", "is on cpu")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def advice(model: nn.Module, report: ReplacementReport, explanation: Explanation) -> list[str]:
    """Sentences, each once."""
    told = [*_of_reasons(report), *_of_layers(model), *_of_paths(explanation)]
    return list(dict.fromkeys(told))


def _of_reasons(report: ReplacementReport) -> Iterator[str]:
    for row in (*report.rows, *report.untraced):
        for words, remedy in _BY_REASON.items():
            if words in row.reason:
                yield f"{row.names[0] or 'the model'}: {remedy} ({row.reason})"


def _of_layers(model: nn.Module) -> Iterator[str]:
    images = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if images and all(module.weight.is_contiguous() and module.weight[0].numel() > 1 for module in images):
        yield "the model: tensor cores want images in channels_last: model.to(memory_format=torch.channels_last)"
    for name, module in model.named_modules():
        children = list(module.named_children()) if isinstance(module, nn.Sequential) else []
        for (before, convolution), (_, norm) in pairwise(children):
            biased = isinstance(convolution, _CONVOLUTIONS) and convolution.bias is not None
            if biased and isinstance(norm, _NORMS) and norm.training:
                yield f"{name + '.' if name else ''}{before}: bias=False; the batch norm behind it takes any bias out"


def _of_paths(explanation: Explanation) -> Iterator[str]:
    for row in explanation:
        if row.path == "stock" and not any(words in row.reason for words in _BY_DESIGN):
            yield f"{row.name or 'the model'} stays on PyTorch's operators: {row.reason}"
