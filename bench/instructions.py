"""What kernels execute for what they move: the part of ``python -m fusednn bench resources`` that launches tell.

For representative operations, at sizes whose extents are multiples of 16 and at others, every launch of both passes:
see `fusednn_bench.instructions`.  Needs no GPU.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH))

from fusednn_bench.launched import take_cpu_tensors

if "fusednn" not in sys.modules:  # whoever imported it has decided
    os.environ.pop("TRITON_INTERPRET", None)
    take_cpu_tensors()

import torch
from fusednn_bench.environment import describe_environment, describe_sources
from fusednn_bench.instructions import records_of
from fusednn_bench.results import new_result, save_result
from fusednn_bench.steps import StepCase
from fusednn_bench.tables import instructions_table

from fusednn.benchmark.cases import Case

OUTPUT = BENCH / "results" / "instructions.json"

_LARGE = (64, 64, 128, 128)
_IMAGES = [(256, 256, side, side) for side in (56, 28, 14)]
_LINES = [(2**26 // classes, classes) for classes in (1024, 1000, 128, 100, 32768, 50257)]
#: Operations of a benchmark, and their sizes.
_SIZES: dict[str, list[tuple[tuple[str, ...], list[tuple[int, ...]]]]] = {
    "activation": [
        (("relu", "silu", "gelu", "mish", "softplus", "elu", "sigmoid", "tanh"), [_LARGE]),
        (("prelu", "prelu_channels_last"), [*_IMAGES[:1], *_IMAGES[2:]]),
        (("rrelu",), [_LARGE]),
    ],
    "dropout": [
        (("dropout", "standout"), [_LARGE]),
        (("dropout2d",), [*_IMAGES[:1], *_IMAGES[2:]]),
        (("bias_activation_dropout_relu", "bias_activation_dropout_gelu"), [(8192, 8192), (65536, 1000)]),
    ],
    "gated": [(("gated", "gated_halves"), [(8192, 14336)])],
    "softmax": [(("softmax", "cross_entropy"), _LINES)],
    "loss": [(("mse_loss", "binary_cross_entropy_with_logits"), [(8192, 8192)])],
    "batch_norm": [
        (("batch_norm_act_relu", "batch_norm_act_add_relu_channels_last"), _IMAGES),
        (("batch_norm_act_relu_channels_last",), [(256, 256, 56, 56)]),
    ],
    "pool": [
        (("max_pool2d_2x2", "max_pool2d_2x2_channels_last"), [(256, 256, 112, 112), *_IMAGES]),
        (("max_pool2d_3x3", "max_pool2d_3x3_channels_last"), [(64, 64, 112, 112)]),
    ],
    "conv": [
        (("conv_act_pool2d_vgg_early", "conv_act_pool2d_resnet50_stem"), [(32, 3, 224, 224)]),
        (("conv_act_pool2d_vgg_middle",), [(32, 128, 56, 56)]),
        (("conv_act_pool2d_vgg16_4", "conv_act_pool2d_vgg16_4_nchw"), [(32, 512, 28, 28)]),
    ],
    "maxout": [
        (("maxout_linear_2", "maxout_linear_4"), [(8192, 1024)]),
        (("maxout",), [_LARGE, (65536, 1000)]),
    ],
}
_DTYPES = (torch.bfloat16, torch.float32)
_OPTIMIZERS = ("adamw", "sgd_momentum", "rmsprop")
MACHINE = json.loads((BENCH / "machine-h100.json").read_text(encoding="utf-8"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fusednn bench resources --instructions", description=__doc__)
    parser.add_argument("names", nargs="*", help="print those whose names have these parts, and write nothing")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, help="%(default)s")
    parsed = parser.parse_args(arguments)
    if parsed.names:
        print(instructions_table(records(cases(parsed.names))))
        return 0
    result = new_result("instructions", describe_environment(), describe_sources(), {"machine": MACHINE})
    result["cases"] = list(records(cases()))
    result["complete"] = True
    save_result(result, parsed.output)
    print(f"{len(result['cases'])} launches: {parsed.output}")
    return 0


def cases(names: Sequence[str] = ()) -> Iterator[Case | StepCase]:
    """The representative ones, or those of them whose names have all these parts."""
    for case in _all():
        if all(name in case.id for name in names):
            yield case


def _all() -> Iterator[Case | StepCase]:
    for benchmark, groups in _SIZES.items():
        operations = import_module(f"bench_{benchmark}").OPERATIONS
        for operation, shape in ((name, shape) for group, shapes in groups for shape in shapes for name in group):
            for dtype in _DTYPES:
                yield Case(operations[operation], dtype, "x".join(map(str, shape)), shape)
    optimizer = import_module("bench_optimizer")
    for dtype in _DTYPES:
        for name in _OPTIMIZERS:
            yield StepCase(optimizer.OPERATIONS[name], dtype, "resnet50", optimizer.SIZES["resnet50"])


def records(wanted: Iterable[Case | StepCase]) -> Iterator[dict[str, Any]]:
    for number, case in enumerate(wanted):
        print(f"\r{number} {case.id}\033[K", end="", file=sys.stderr, flush=True)
        yield from records_of(case, MACHINE)
    print(file=sys.stderr)


#: Those whose figures the baseline has: each family's, in 16 bits, at a size that 16 doesn't divide.
_IN_BASELINE = (
    *("relu-bf16-64x64x128x128", "gelu-bf16-64x64x128x128", "dropout-bf16-64x64x128x128"),
    *("softmax-bf16-67108x1000", "cross_entropy-bf16-67108x1000", "batch_norm_act_relu-bf16-256x256x14x14"),
    *("max_pool2d_2x2-bf16-256x256x28x28", "conv_act_pool2d_vgg_early-bf16-32x3x224x224", "adamw-bf16-resnet50"),
)


def entries() -> dict[str, list[int]]:
    """Of the baseline: instructions for a thousand elements, and spills."""
    found = {}
    for record in records(case for case in _all() if case.id in _IN_BASELINE):
        name = f"{record['operation']} {record['direction']} {record['configuration']}"
        found[name] = [round(1000 * record["instructions"]), record["spills"]]
    return found


if __name__ == "__main__":
    sys.exit(main())
