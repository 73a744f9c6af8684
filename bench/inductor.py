"""Count launches and bytes of compiled training steps: ``python -m fusednn bench inductor [-o FILE] [-k NAME] [-v]``.

Stock networks, the same replaced, and fused, each as Inductor would compile it for an H100.  Needs no GPU.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # whoever imports this has decided
    os.environ.pop("TRITON_INTERPRET", None)
BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH))

from fusednn_bench.compiled_steps import CONTESTANTS, compiled_steps
from fusednn_bench.environment import describe_environment, describe_sources
from fusednn_bench.results import new_result, save_result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fusednn bench inductor", description="Count compiled training steps.")
    parser.add_argument("-o", "--output", type=Path, default=BENCH / "results" / "inductor.json", help="%(default)s")
    parser.add_argument(
        "-k", metavar="TEXT", help="only networks with this in their name, size or dtype; write nothing"
    )
    parser.add_argument(
        "--mode",
        choices=("default", "reduce-overhead", "max-autotune"),
        default="default",
        help="of torch.compile; write nothing of others than %(default)s",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show each launch")
    parsed = parser.parse_args(arguments)
    result = new_result("inductor", describe_environment(), describe_sources(), {"gpu": "NVIDIA H100, made up"})
    for step in compiled_steps():
        if parsed.k and parsed.k not in step.id:
            continue
        for contestant in CONTESTANTS:
            counts = step.count(contestant, parsed.mode)
            result["cases"].append(step.record(contestant, counts))
            print(
                f"{step.id:50} {contestant:9} {counts.launched():3} launches {counts.bytes() / 1e6:8.2f} MB", flush=True
            )
            for refusal in counts.refusals if parsed.mode != "default" else ():
                print(f"    no CUDA graph: {refusal}")
            if parsed.verbose:
                print(
                    "\n".join(
                        f"    {launch.bytes / 1e6:8.2f} MB {launch.maker:9} {launch.name}" for launch in counts.launches
                    )
                )
    if not parsed.k and parsed.mode == "default":
        result["complete"] = True
        save_result(result, parsed.output)
        print(f"{len(result['cases'])} counted steps: {parsed.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
