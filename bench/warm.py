"""Compile what the benchmarks of a family need, into the caches on disk: ``python bench/warm.py bench_pool``.

Every contestant of every quick case is called once.  Families are compiled side by side, each in a process, while tests
use the GPU; later the benchmarks find all of it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fusednn_bench.where import TIMED, prepare

if __name__ == "__main__":  # whoever imports this has decided
    prepare()
# isort: split
from fusednn_bench.instant import run_once

from fusednn.benchmark.protocol import CONTESTANTS


def main(family: str) -> int:
    module = import_module(family)
    for case in module.timed_cases(full=False) if TIMED else module.counted_cases():
        run_once(case, case.contestants(CONTESTANTS[:3]))
        print(case.id, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
