"""Count what networks keep for the backward pass: ``python -m fusednn bench memory [-o FILE] [NETWORK...]``.

Needs no GPU: kernels run in Triton's interpreter.  torchvision and transformers have to be there, as ``make
test-thorough`` has them: ``PYTHONPATH=.build/models``.

With ``--layers`` it is a census: which layers keep the most where results are made again.  With ``--peak`` the
allocator of a GPU says what training steps hold at most; networks of libraries that aren't there are left out.
``--rehearse`` counts tensors in its place, where there is no GPU.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "--peak" not in sys.argv:  # whoever imports this has decided
    os.environ.setdefault("TRITON_INTERPRET", "1")
BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCH), str(BENCH.parent / "tests")]

import torch
from fusednn_bench.environment import describe_environment, describe_settings, describe_sources
from fusednn_bench.memory import NETWORKS, count_layers, count_memory
from fusednn_bench.memory_peak import enlarged, measure_peaks
from fusednn_bench.memory_table import layers_table
from fusednn_bench.results import new_result, save_result
from support.torchvision import mend_torchvision


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fusednn bench memory", description="Count what networks keep.")
    parser.add_argument(
        "-o", "--output", type=Path, help="default: memory.json, census.json or peak.json in bench/results"
    )
    parser.add_argument("--layers", action="store_true", help="layers that keep the most where results are made again")
    parser.add_argument("--peak", action="store_true", help="measure the peak of training steps, on a GPU")
    parser.add_argument("--rehearse", action="store_true", help="the peak without a GPU: tensors are counted")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="networks at a time: %(default)s")
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(case.name for case in NETWORKS))
    parsed = parser.parse_args(arguments)
    kind = "peak" if parsed.peak else "census" if parsed.layers else "memory"
    output = parsed.output or BENCH / "results" / f"{kind}.json"
    result = new_result(kind, describe_environment(), describe_sources(), describe_settings())
    known = [case.name for case in NETWORKS]
    chosen = [name for name in known if not parsed.networks or name in parsed.networks]
    if parsed.layers:
        mend_torchvision()
        result["cases"] = [count_layers(case) for case in NETWORKS if case.name in chosen]
        result["complete"] = chosen == known
        save_result(result, output)
        print(layers_table(result))
        return 0
    if parsed.peak:
        return _peaks(result, chosen, output, parsed.rehearse)
    with ProcessPoolExecutor(parsed.jobs, get_context("spawn"), initializer=mend_torchvision) as pool:
        for name, records in zip(chosen, pool.map(_count, chosen), strict=True):
            result["cases"] += records
            shares = [
                f"{record['contestant']} {record['kept_bytes'] / records[0]['kept_bytes']:.2f}" for record in records
            ]
            print(f"{name}: {', '.join(shares)}", flush=True)
            save_result(result, output)
    result["complete"] = chosen == known
    save_result(result, output)
    return 0


def _peaks(result: dict[str, Any], chosen: Sequence[str], output: Path, rehearse: bool) -> int:
    """Networks one after another: each has the device to itself."""
    if not (rehearse or torch.cuda.is_available()):
        print("fusednn bench memory --peak: PyTorch sees no GPU here", file=sys.stderr)
        return 2
    device = torch.device("cpu" if rehearse else "cuda")
    cases = [case if rehearse else enlarged(case) for case in NETWORKS if case.name in chosen]
    for case in cases:
        try:
            records = measure_peaks(case, device)
        except ImportError as error:
            result["left_out"].append({"case": case.name, "contestant": None, "reason": str(error)})
            continue
        result["cases"] += records
        shares = [f"{record['contestant']} {record['peak_bytes'] / records[0]['peak_bytes']:.2f}" for record in records]
        print(f"{case.name}: {', '.join(shares)}", flush=True)
        save_result(result, output)
    result["complete"] = len(result["cases"]) > 0 and not rehearse
    save_result(result, output)
    return 0


def _count(name: str) -> list[dict[str, Any]]:
    """The records of a network, in a process of the pool."""
    return next(count_memory(case) for case in NETWORKS if case.name == name)


if __name__ == "__main__":
    sys.exit(main())
