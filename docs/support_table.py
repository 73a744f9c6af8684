"""Writes the tables of docs/support.md, from the code.  ``python docs/support_table.py [--check]``."""

import sys
from pathlib import Path

import torch
from torch import nn

from fusednn import autograd, layers, optim
from fusednn.kernels.functions.activation import ACTIVATIONS, OVERWRITING, Activation
from fusednn.kernels.functions.optimizer import ALGORITHMS

PAGE = Path(__file__).resolve().with_name("support.md")

# Alone, and with a residual and an activation whose gradient a bit suffices for.
_BATCH_NORM_ACT = ("the input; with a residual 1 bit an element", "3e; 4e + 1/8", "5e; 6e + 1/8")

# Layers whose family has kernels of its own: function, what is kept, bytes an element forward and backward.  The table
# of activations knows the others'.
OWN_KERNELS = {
    "CrossEntropyLoss": ("cross_entropy", "the input, 8 bytes a sample", "e", "2e"),
    "LinearCrossEntropyLoss": ("linear_cross_entropy", "the operands and their gradients", "never all logits", "-"),
    "LogSoftmax": ("log_softmax", "the output", "2e", "3e"),
    "Softmax": ("softmax", "the output", "2e", "3e"),
    "Softmax2d": ("softmax", "the output", "2e", "3e"),
    "Softmin": ("softmin", "the output", "2e", "3e"),
    **{
        layer: (function, "the operands", "2e (mean)", "3e")
        for layer, function in {
            "BCELoss": "binary_cross_entropy",
            "BCEWithLogitsLoss": "binary_cross_entropy_with_logits",
            "HuberLoss": "huber_loss",
            "KLDivLoss": "kl_div",
            "L1Loss": "l1_loss",
            "MSELoss": "mse_loss",
            "SmoothL1Loss": "smooth_l1_loss",
        }.items()
    },
    "Conv1d": ("conv1d", "the operands", "cuDNN's", "cuDNN's"),
    "Conv2d": ("conv2d", "the operands", "cuDNN's", "cuDNN's"),
    "ConvAct2d": (
        "conv_act_pool2d",
        "the operands, 1 bit an element (ReLU)",
        "2e + 1/8 (after cuDNN's)",
        "2e + 1/8 (before cuDNN's)",
    ),
    "ConvBatchNormAct2d": (
        "conv_batch_norm_act2d",
        "the operands, the convolution's result, 4 bits a window (ReLU, 2 x 2)",
        "2.25e + 1/8 (after cuDNN's)",
        "5.25e + 1/8 (before cuDNN's)",
    ),
    "ConvMaxPool2d": (
        "conv_act_pool2d",
        "the operands, 4 bits a window (ReLU, 2 x 2)",
        "1.25e + 1/8 (after cuDNN's)",
        "1.25e + 1/8 (before cuDNN's)",
    ),
    "MaxPool1d": ("max_pool1d", "1 byte a window", "e + (e + 1) / stride", "e + (e + 1) / stride"),
    "MaxPool2d": ("max_pool2d", "2 bits a window (2 x 2), at most 1 byte", "1.25e + 1/16", "1.25e + 1/16"),
    **{
        f"{layer}{dims}d": (function, *facts)
        for layer, function, *facts in (
            ("BatchNorm", "batch_norm", "the input", "3e", "5e"),
            ("BatchNormAct", "batch_norm_act", *_BATCH_NORM_ACT),
        )
        for dims in (1, 2, 3)
    },
    "SyncBatchNorm": ("sync_batch_norm", "the input", "3e", "5e"),
    "SyncBatchNormAct": ("sync_batch_norm", *_BATCH_NORM_ACT),
    "InputNorm": ("batch_norm", "the input", "2e", "2e"),
    "GlobalContrastNorm": ("batch_norm", "the input", "3e", "5e"),
    **{
        layer: (function, "a seed", "2e", "2e")
        for layer, function in {
            "AlphaDropout": "alpha_dropout",
            "Dropout": "dropout",
            "Dropout1d": "dropout1d",
            "Dropout2d": "dropout2d",
            "Dropout3d": "dropout3d",
            "FeatureAlphaDropout": "feature_alpha_dropout",
        }.items()
    },
    "BiasActivationDropout": (
        "bias_activation_dropout",
        "1 bit an element; the operands and a seed for smooth activations",
        "2e + 1/8, or 2e; with a residual e more",
        "2e + 1/8, or 3e",
    ),
    "DropConnect": (
        "drop_connect_linear",
        "the operands, and a seed",
        "2e a weight, and the product",
        "4e a weight, and the products",
    ),
    "Maxout": (
        "maxout_linear",
        "the operands, 1 byte a maximum",
        "the operands, e + 1 a maximum",
        "e + 1 a maximum, an expansion of pieces e or none",
    ),
    "MaxoutConv2d": (
        "maxout_conv2d",
        "the operands, 1 byte a maximum",
        "beside the convolution, (pieces + 1) e + 1 a maximum",
        "the same",
    ),
    "NLLLoss": ("nll_loss", "the operands", "e + 8 a target", "e, and e + 8 a target"),
    "PReLU": ("prelu", "the input", "2e", "3e"),
    "RReLU": ("rrelu", "1 bit an element, and a seed", "2e + 1/8", "2e + 1/8"),
    "Standout": ("standout", "1 bit an element", "3e + 1/8", "2e + 1/8"),
}

# The updates that an optimizer has, by the argument that asks for them.
UPDATES = {
    "SGD": {"": "sgd", "momentum": "sgd_momentum"},
    "RMSprop": {
        "": "rmsprop",
        "momentum": "rmsprop_momentum",
        "centered": "rmsprop_centered",
        "centered, momentum": "rmsprop_centered_momentum",
    },
    "Adam": {"": "adam", "amsgrad": "adam_amsgrad"},
    "AdamW": {"": "adam", "amsgrad": "adam_amsgrad"},
}


def support_table() -> str:
    """A Markdown table: a row per layer."""
    lines = [
        "| layer | function | keeps for the backward pass | bytes an element, forward | backward |",
        "|---|---|---|---|---|",
    ]
    exported = (getattr(layers, name) for name in layers.__all__)
    for layer in sorted(filter(_is_layer, exported), key=lambda layer: layer.__name__.lower()):
        function, *facts = OWN_KERNELS.get(layer.__name__) or _activation(layer.__name__)
        lines.append(f"| `{layer.__name__}` | `{function}` | {' | '.join(facts)} |")
    return "\n".join(lines)


def _is_layer(exported: object) -> bool:
    return isinstance(exported, type) and issubclass(exported, nn.Module)


def _activation(layer: str) -> tuple[str, str, str, str]:
    (function,) = (name for name in autograd.__all__ if name.replace("_", "") == layer.lower())
    row = ACTIVATIONS[function]
    keeps = _keeps(row)
    if row.overwriting is not None:
        keeps += f" ({_keeps(OVERWRITING[row.overwriting])} in place)"
    forward, backward = (_in_elements(bytes_) for bytes_ in row.budget(8, torch.float32))
    return function, keeps, forward, backward


def _keeps(row: Activation) -> str:
    return "1 bit an element" if row.saves == "mask" else f"the {row.saves}"


def _in_elements(bytes_of_eight_floats: float) -> str:
    """Bytes as a multiple of the element size e, and what is left over as bits."""
    elements, rest = divmod(bytes_of_eight_floats, 32)
    return f"{elements:.0f}e" + (" + 1/8" if rest else "")


def optimizer_table() -> str:
    """A Markdown table: a row per optimizer and what it keeps."""
    lines = ["| optimizer | with | state | bytes a parameter |", "|---|---|---|---|"]
    exported = (getattr(optim, name) for name in optim.__all__)
    for cls in sorted(filter(_is_optimizer, exported), key=lambda cls: cls.__name__.lower()):
        for argument, name in UPDATES.get(cls.__name__, {"": cls.__name__.lower()}).items():
            row = ALGORITHMS[name]
            state = ", ".join(f"`{key}`" for key in row.states)
            size = row.budget(1, torch.float32) // torch.float32.itemsize
            lines.append(f"| `{cls.__name__}` | {argument} | {state} | {size}e |")
    return "\n".join(lines)


def _is_optimizer(exported: object) -> bool:
    return isinstance(exported, type) and exported in optim.FusedOptimizer.__subclasses__()


TABLES = {"support table": support_table, "optimizer table": optimizer_table}


def updated(page: str) -> str:
    """The page's text with the tables as they should be."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: begin (docs/support_table.py) -->", f"<!-- {name}: end -->"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n{table()}\n{end}{after}"
    return page


def main() -> int:
    text = PAGE.read_text()
    if "--check" in sys.argv[1:]:
        return int(updated(text) != text)
    PAGE.write_text(updated(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
