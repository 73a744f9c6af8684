"""Writes the tables of docs/support.md, from the code.  ``python docs/support_table.py``."""

from pathlib import Path

import torch
from torch import nn

from fusednn import layers, optim
from fusednn.catalogue import row_of_layer
from fusednn.kernels.functions.optimizer import ALGORITHMS

PAGE = Path(__file__).resolve().with_name("support.md")

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
        row = row_of_layer(layer.__name__)
        lines.append(f"| `{layer.__name__}` | `{row.name}` | {row.keeps} | {row.forward} | {row.backward} |")
    return "\n".join(lines)


def _is_layer(exported: object) -> bool:
    return isinstance(exported, type) and issubclass(exported, nn.Module)


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


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
