"""Count what networks keep for the backward pass: ``python -m fusednn bench memory [-o FILE] [NETWORK...]``.

Needs no GPU: kernels run in Triton's interpreter.  torchvision and transformers have to be there, as ``make
test-thorough`` has them: ``PYTHONPATH=.build/models``.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # whoever imports this has decided
    os.environ.setdefault("TRITON_INTERPRET", "1")
BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCH), str(BENCH.parent / "tests")]

from fusednn_bench.environment import describe_environment, describe_settings, describe_sources
from fusednn_bench.memory import NETWORKS, count_memory
from fusednn_bench.results import new_result, save_result
from support.torchvision import mend_torchvision


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fusednn bench memory", description="Count what networks keep.")
    parser.add_argument("-o", "--output", type=Path, default=BENCH / "results" / "memory.json", help="%(default)s")
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(case.name for case in NETWORKS))
    parsed = parser.parse_args(arguments)
    mend_torchvision()
    result = new_result("memory", describe_environment(), describe_sources(), describe_settings())
    chosen = [case for case in NETWORKS if not parsed.networks or case.name in parsed.networks]
    for case in chosen:
        records = count_memory(case)
        result["cases"] += records
        of_stock = [
            f"{record['contestant']} {record['kept_bytes'] / records[0]['kept_bytes']:.2f}" for record in records
        ]
        print(f"{case.name}: {', '.join(of_stock)}", flush=True)
        save_result(result, parsed.output)
    result["complete"] = chosen == list(NETWORKS)
    save_result(result, parsed.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
