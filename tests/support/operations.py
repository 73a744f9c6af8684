"""Every function and layer of ours beside PyTorch's, with operands: what checks of all families go through.

The calls of layers, and of functions that ``torch.nn.functional`` lacks, are those of ``python -m fusednn check``; here
are those that it has no need of.
"""

from typing import Any

import torch
import torch.nn.functional as F

from fusednn import autograd

from .samples import random_tensor

__all__ = ["ARGUMENTS"]

# --- Functions that ``torch.nn.functional`` has too, by their arguments -----------------------------------------------

_X = random_tensor((2, 4), torch.float32, "cpu")
_P = _X.sigmoid()
_T = random_tensor((2, 4), torch.float32, "cpu", seed=1).sigmoid()
_IMAGES = random_tensor((1, 2, 4, 5), torch.float32, "cpu")
_CLASSES = torch.tensor([1, 3])

_SPECIAL: dict[str, dict[str, Any]] = {
    "batch_norm": {
        "input": _IMAGES,
        **dict(zip(("running_mean", "running_var"), (torch.zeros(2), torch.ones(2)), strict=True)),
        **dict(zip(("weight", "bias"), (torch.ones(2), torch.zeros(2)), strict=True)),
        "training": True,
    },
    "conv1d": {"input": _IMAGES[0], "weight": random_tensor((3, 2, 2), torch.float32, "cpu"), "bias": torch.ones(3)},
    "conv2d": {"input": _IMAGES, "weight": random_tensor((3, 2, 2, 2), torch.float32, "cpu"), "bias": torch.ones(3)},
    "linear_cross_entropy": {
        "input": _X,
        "linear_weight": random_tensor((5, 4), torch.float32, "cpu"),
        "target": _CLASSES,
    },
    "max_pool1d": {"input": _IMAGES[0], "kernel_size": 2},
    "max_pool2d": {"input": _IMAGES, "kernel_size": 2},
    "prelu": {"input": _X, "weight": torch.tensor([0.3])},
    "rrelu": {"input": _X, "lower": 0.25, "upper": 0.25},
    "threshold": {"input": _X, "threshold": 0.1, "value": -1.0},
    **{key: {"input": _X, "target": _CLASSES} for key in ("cross_entropy", "nll_loss")},
    **{key: {"input": _X, "dim": 1} for key in ("log_softmax", "softmax", "softmin")},
    **{key: {"input": _X, "target": _T} for key in ("kl_div", "binary_cross_entropy_with_logits")},
    **{key: {"input": _X, "target": _T} for key in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")},
    "binary_cross_entropy": {"input": _P, "target": _T},
    # A probability of 1 leaves nothing to chance.
    **{key: {"input": _X, "p": 1.0, "training": True} for key in ("dropout", "alpha_dropout")},
    **{key: {"input": _IMAGES, "p": 1.0, "training": True} for key in ("dropout2d", "feature_alpha_dropout")},
    "dropout1d": {"input": _IMAGES[0], "p": 1.0, "training": True},
    "dropout3d": {"input": _IMAGES, "p": 1.0, "training": True},
}

#: By name, arguments of each function that ``torch.nn.functional`` has too.
ARGUMENTS: dict[str, dict[str, Any]] = {
    name: _SPECIAL.get(name, {"input": _X}) for name in autograd.__all__ if hasattr(F, name)
}
