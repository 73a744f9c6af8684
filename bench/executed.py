"""What compiled kernels do, counted on the tests' virtual GPU (``tests/vgpu``): a representative size of each family.

Like the benchmarks, the virtual GPU isn't installed: a checkout has both.  It needs gcc.
"""

# ruff: noqa: E402
from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["FUSEDNN_VGPU"] = "80"
TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

import support.compiled  # noqa: F401  (puts kernels on the virtual GPU, before fusednn is imported)
import torch
from torch import Tensor
from vgpu import Counters, counted

from fusednn import autograd, optim


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def _image(count: int, channels: int, size: int = 12) -> Tensor:
    """Or a filter, as the single kernel of a convolution takes them."""
    x = torch.randn(count, channels, size, size, dtype=torch.float16)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


#: In float32, convolutions in float16.  Small tensors weigh scalars (a mean, a seed, a target) heavily: a sector for 4
#: or 8 bytes.
CASES: dict[str, Callable[[], Tensor]] = {
    "relu": lambda: autograd.relu(_normal(8192)),
    "gelu": lambda: autograd.gelu(_normal(8192)),
    "dropout": lambda: autograd.dropout(_normal(8192), 0.5, True),
    "softmax of rows": lambda: autograd.softmax(_normal(64, 512), 1),
    "softmax of columns": lambda: autograd.softmax(_normal(64, 512), 0),
    "cross_entropy": lambda: autograd.cross_entropy(_normal(64, 512), torch.arange(64)),
    "mse_loss": lambda: autograd.mse_loss(_normal(8192), torch.randn(8192)),
    "prelu": lambda: autograd.prelu(_normal(4, 16, 16, 16), _normal(16)),
    "batch_norm": lambda: autograd.batch_norm(_normal(8, 16, 16, 16), None, None, _normal(16), _normal(16), True),
    "max_pool2d": lambda: autograd.max_pool2d(_normal(4, 16, 16, 16), 2),
    "maxout": lambda: autograd.maxout(_normal(64, 128), 2),
    "maxout_linear": lambda: autograd.maxout_linear(_normal(64, 64), _normal(2, 64, 64)),
    "bias_activation_dropout": lambda: autograd.bias_activation_dropout(
        _normal(64, 128), _normal(128), activation="relu", p=0.5, training=True
    ),
    "drop_connect_linear": lambda: autograd.drop_connect_linear(_normal(64, 64), _normal(64, 64), _normal(64), 0.5),
    "standout": lambda: autograd.standout(_normal(64, 128), _normal(64, 128)),
    "gated": lambda: autograd.gated(_normal(64, 128), _normal(64, 128), "gelu"),
    "conv_act_pool2d": lambda: autograd.conv_act_pool2d(
        _image(2, 16), _image(32, 16, 3), activation="relu", pool_size=2
    ),
}


def _step(optimizer_class: Any, **options: Any) -> Callable[[], object]:
    """A later one: the first makes state."""
    parameters = [torch.nn.Parameter(torch.randn(numel)) for numel in (4096, 100)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = optimizer_class(parameters, lr=1e-3, **options)
    optimizer.step()
    step: Callable[[], object] = optimizer.step
    return step


#: Of optimizers, with the names of what they do in one pass.
STEPS: dict[str, Callable[[], Callable[[], object]]] = {
    "sgd": lambda: _step(optim.SGD, momentum=0.9),
    "adamw": lambda: _step(optim.AdamW),
    "rmsprop": lambda: _step(optim.RMSprop),
}


class Executed(NamedTuple):
    """Sectors of 32 bytes of global memory, and the bytes of them that are used; waves of shared memory, and how few
    would do without bank conflicts; instructions of warps.
    """

    sectors: int
    bytes_used: int
    waves: int
    least_waves: int
    instructions: dict[str, int]  # by class

    @classmethod
    def by(cls, launches: list[Counters]) -> Executed:
        traffic = [each for launch in launches for each in (launch.loads, launch.stores)]
        classes = sorted({name for launch in launches for name in launch.instructions})
        return cls(
            sum(each.sectors for each in traffic),
            sum(each.bytes_used for each in traffic),
            sum(launch.shared.waves for launch in launches),
            sum(launch.shared.least_waves for launch in launches),
            {name: sum(launch.instructions.get(name, 0) for launch in launches) for name in classes},
        )

    @property
    def figures(self) -> list[int]:
        """Those of the baseline."""
        return [self.sectors, self.waves, sum(self.instructions.values())]

    @property
    def text(self) -> str:
        used, conflicts = 32 * self.sectors / max(self.bytes_used, 1), self.waves / max(self.least_waves, 1)
        return (
            f"{self.sectors} sectors, {used:.2f} times the bytes in use; {self.waves} waves of shared memory"
            + (f", {conflicts:.2f} times as many as without conflicts" if self.waves else "")
            + f"; instructions: {', '.join(f'{count} {name}' for name, count in self.instructions.items())}"
        )


def names() -> list[str]:
    """Of everything that is counted."""
    return [f"{case} {pass_}" for case in CASES for pass_ in ("forward", "backward")] + [
        f"{case} step" for case in STEPS
    ]


def passes(name: str) -> Iterator[tuple[str, Executed]]:
    """A case's two passes, or an optimizer's one, named."""
    torch.manual_seed(0)  # some instructions are for some values
    if name in STEPS:
        call = STEPS[name]()
        with counted() as step:
            call()
        yield f"{name} step", Executed.by(step)
        return
    with counted() as forward:
        y = CASES[name]()
    with counted() as backward:
        y.sum().backward()
    yield f"{name} forward", Executed.by(forward)
    yield f"{name} backward", Executed.by(backward)


def entries() -> dict[str, Any]:
    """Of the baseline."""
    return {name: executed.figures for case in (*CASES, *STEPS) for name, executed in passes(case)}


if __name__ == "__main__":
    for case in (*CASES, *STEPS):
        for name, executed in passes(case):
            print(f"{name}: {executed.text}")
