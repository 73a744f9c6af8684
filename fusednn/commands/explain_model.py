"""``python -m fusednn explain-model module:function``: what replacing leaves of a model to PyTorch, and why."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from typing import Any

import torch
from torch import nn

from .. import kernels
from ..instruments.operators_left import LeftOperator, operators_left
from ..layers import replace_functions, replace_layers
from ..layers.table import format_table

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODULE:FUNCTION", help="returns a model, and its inputs: (model, batch, ...)")
    parser.add_argument("--functions", action="store_true", help="replace the functions of torch.nn.functional, too")
    parser.add_argument("--evaluation", action="store_true", help="in evaluation instead of training")


def run(arguments: argparse.Namespace) -> int:
    if not (kernels.ON_CPU or torch.cuda.is_available()):
        # Where kernels run is decided when Triton is imported.
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        return subprocess.run([sys.executable, "-m", "fusednn", *sys.argv[1:]], env=environment, check=False).returncode
    module, _, function = arguments.model.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        print(f"fusednn explain-model: {error}", file=sys.stderr)
        return 2
    model, *inputs = make()
    model.train(not arguments.evaluation)
    stock, left, report = _served(model, inputs, arguments.functions)
    print(
        format_table(
            ("module", "class", "operator", "calls", "why it is PyTorch's"), [[str(one) for one in row] for row in left]
        )
    )
    calls = sum(row.calls for row in left)
    print(f"{calls} of {stock} operators that there are kernels for are left to PyTorch")
    for row in report.untraced:
        print(f"no neighbours fused in {row.names[0] or '(model)'} ({row.layer}): {row.reason}")
    return 0


def _served(model: nn.Module, inputs: Any, functions: bool) -> tuple[int, list[LeftOperator], Any]:
    """The operators in the model as it is; those that are left when it is replaced, and the report of that."""
    with torch.no_grad():
        stock = sum(row.calls for row in operators_left(model, *inputs))
        report = replace_layers(model, fuse=True)
        if not functions:
            return stock, operators_left(model, *inputs), report
        with replace_functions():
            return stock, operators_left(model, *inputs), report
