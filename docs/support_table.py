"""Writes the support table into README.md, from the code.  ``python docs/support_table.py [--check]``."""

import sys
from pathlib import Path

import torch
from torch import nn

from fusednn import autograd, layers
from fusednn.kernels.activation import ACTIVATIONS, Activation

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- support table: begin (docs/support_table.py) -->", "<!-- support table: end -->"

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
    "NLLLoss": ("nll_loss", "the operands", "e + 8 a target", "e, and e + 8 a target"),
    "PReLU": ("prelu", "the input", "2e", "3e"),
    "RReLU": ("rrelu", "1 bit an element, and a seed", "2e + 1/8", "2e + 1/8"),
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
    half = ACTIVATIONS[row.name_for(torch.bfloat16)]
    if half is not row:
        keeps += f" ({_keeps(half)} in 16 bits)"
    forward, backward = (_in_elements(bytes_) for bytes_ in row.budget(8, torch.float32))
    return function, keeps, forward, backward


def _keeps(row: Activation) -> str:
    return "1 bit an element" if row.saves == "mask" else f"the {row.saves}"


def _in_elements(bytes_of_eight_floats: float) -> str:
    """Bytes as a multiple of the element size e, and what is left over as bits."""
    elements, rest = divmod(bytes_of_eight_floats, 32)
    return f"{elements:.0f}e" + (" + 1/8" if rest else "")


def updated(readme: str) -> str:
    """The README's text with the table as it should be."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{support_table()}\n{END}{after}"


def main() -> int:
    text = README.read_text()
    if "--check" in sys.argv[1:]:
        return int(updated(text) != text)
    README.write_text(updated(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
