"""What making results again costs the host: ``python bench/memory_host.py [-o FILE]``, over a GPU that does nothing.

A training step of ResNet-50 with an eighth of its channels, on tiny images: launches and hooks are as many as ever.
Needs gcc and torchvision (``PYTHONPATH=.build/models``), and no GPU.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Sequence
from pathlib import Path

BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCH), str(BENCH.parent / "tests")]

_SHAPE = (2, 3, 33, 33)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What making results again costs the host.")
    default = BENCH / "results" / "host-recompute.json"
    parser.add_argument("-o", "--output", type=Path, default=default, help="%(default)s")
    parser.add_argument("--seconds", type=float, default=30.0, help="default: %(default)s")
    parsed = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)
    from fusednn_bench.do_nothing import install

    launches = install()
    import torch
    from fusednn_bench.environment import describe_environment, describe_sources
    from fusednn_bench.host_cases import KERNELS, Call, HostCase
    from fusednn_bench.memory import NETWORKS, narrowed
    from fusednn_bench.results import new_result, save_result
    from fusednn_bench.tables import host_table
    from host import records
    from support.torchvision import mend_torchvision
    from torch import nn

    import fusednn

    torch.set_num_threads(1)
    mend_torchvision()
    torch.manual_seed(0)
    network = next(case for case in NETWORKS if case.name == "ResNet-50")
    stock = narrowed(network.build())
    fused, again = copy.deepcopy(stock), copy.deepcopy(stock)
    fusednn.replace_layers(fused, fuse=True)
    fusednn.replace_layers(again, fuse=True, recompute=True)
    x = torch.randn(_SHAPE)

    def step(model: nn.Module) -> Call:
        parameters = list(model.parameters())

        def call() -> None:
            for parameter in parameters:
                parameter.grad = None
            model(x).sum().backward()

        return call

    models = {"eager": stock, "fusednn": fused, KERNELS: fused, "fusednn-recompute": again}
    calls = {name: step(model) for name, model in models.items()}
    case = HostCase("network", network.name, "training_step", _SHAPE, calls)
    settings = {"threads": 1, "over": "a driver that does nothing"}
    result = new_result("host", describe_environment(), describe_sources(), settings)
    result["cases"] += records(case, launches, seconds=parsed.seconds)
    result["complete"] = True
    save_result(result, parsed.output)
    print(host_table(result["cases"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
