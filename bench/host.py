"""What calls cost the host, over a GPU that does nothing where none is: ``python -m fusednn bench host [-o FILE]``.

CPU time of layers of every family, of networks and optimizers, beside stock's: the contestants take turns in short
rounds, and the 5th percentile is what counts, since other programs run on the machine as well.  Launches are counted,
those that Triton had to prepare, and operators of ours that went through PyTorch's dispatcher.  Stock is PyTorch's on
the CPU with tiny tensors, so its arithmetic on some hundred elements is part of its time.  Needs gcc.

With a GPU both run on that: what its driver takes for launches is part of both contestants' time.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH))

if TYPE_CHECKING:
    from fusednn_bench.host_cases import HostCase

#: The most rounds of a case, and the time that they may take together, in seconds.
_ROUNDS, _SECONDS = 150, 2.5
#: Calls in a row: of about this many microseconds, and so many at least; the first finds the other's memory cached.
_ROUND_US, _LEAST = 300, 10
_WARM = 30


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fusednn bench host", description="What calls cost the host, without a GPU.")
    parser.add_argument("-o", "--output", type=Path, default=BENCH / "results" / "host.json", help="%(default)s")
    parser.add_argument(
        "-k", metavar="NAME", default="", help="only operations whose name has this in it; none are kept"
    )
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="for each case (default: %(default)s)")
    parser.add_argument("--warm", action="store_true", help="compile what is launched, and measure nothing")
    parsed = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)
    from fusednn_bench.do_nothing import install
    from fusednn_bench.where import TIMED

    launches = None if TIMED else install()
    import torch
    from fusednn_bench.environment import describe_environment, describe_sources
    from fusednn_bench.host_cases import host_cases
    from fusednn_bench.results import new_result, save_result
    from fusednn_bench.tables import host_table

    torch.set_num_threads(1)
    settings = {"threads": 1, "over": "the GPU's own driver" if TIMED else "a driver that does nothing"}
    result = new_result("host", describe_environment(), describe_sources(), settings)
    for case in _made_on("cuda" if TIMED else "cpu", host_cases()):
        if parsed.k.lower() in case.operation.lower():
            result["cases"] += records(case, launches, timed=not parsed.warm, seconds=parsed.seconds)
            if not (parsed.k or parsed.warm):
                save_result(result, parsed.output)
            print(f"\r{case.operation} {case.direction}".ljust(60), end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if parsed.warm:
        return 0
    print(host_table(result["cases"]))
    if not parsed.k:
        result["complete"] = True
        save_result(result, parsed.output)
        print(f"{len(result['cases'])} records: {parsed.output}")
    return 0


def _made_on(device: str, cases: Iterable[HostCase]) -> Iterator[HostCase]:
    """Cases whose tensors are made on a device; their calls run without its mode, which both sides would notice."""
    import torch

    making = iter(cases)
    while True:
        with torch.device(device):
            case = next(making, None)
        if case is None:
            return
        yield case


def records(
    case: HostCase, launches: Callable[[], int] | None, *, timed: bool = True, seconds: float = _SECONDS
) -> Iterator[dict[str, Any]]:
    """One for each contestant; not ``timed``, what is counted alone.  Triton counts launches where nobody else does."""
    from fusednn_bench.do_nothing import without_kernels
    from fusednn_bench.host_cases import KERNELS

    import fusednn

    def under(name: str) -> fusednn.always_kernels:
        return fusednn.always_kernels(name == KERNELS)

    counts = {}
    with without_kernels() if case.refused else nullcontext():
        for name, call in case.calls.items():
            with under(name):
                for _ in range(_WARM):
                    call()
                counts[name] = _counts(call, launches)
        samples = _measure(case.calls, under, seconds) if timed else {}
    for name in case.calls:
        yield {
            "family": case.family,
            "operation": case.operation,
            "contestant": name,
            "direction": case.direction,
            "dtype": "float32",
            "size": "tiny",
            "shape": list(case.shape),
            **({"cpu_us": samples[name]} if timed else {}),
            **counts[name],
        }


def _measure(
    calls: dict[str, Callable[[], object]], under: Callable[[str], AbstractContextManager[None]], seconds: float
) -> dict[str, list[float]]:
    """Microseconds of CPU time of a call, one figure a round; each ``under`` what its contestant's name means."""
    import torch

    clock = time.process_time_ns
    numbers = {}
    for name, call in calls.items():
        with under(name):
            start = clock()
            call()
            numbers[name] = max(_LEAST, round(_ROUND_US * 1e3 / max(clock() - start, 1)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    ends = time.monotonic() + seconds
    gc.collect()
    gc.disable()
    try:
        while len(samples[order[0][0]]) < _ROUNDS and (time.monotonic() < ends or len(samples[order[0][0]]) < 20):
            order.reverse()
            for name, call in order:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()  # a full queue would keep the host
                with under(name):
                    start = clock()
                    for _ in range(numbers[name]):
                        call()
                    samples[name].append((clock() - start) / numbers[name] / 1e3)
    finally:
        gc.enable()
    return samples


def _counts(call: Callable[[], object], launches: Callable[[], int] | None) -> dict[str, int]:
    import torch
    from triton.runtime.jit import JITFunction

    launched = _entered(call) if launches is None else _increase(call, launches)
    with (
        _counted(JITFunction, "run") as prepared,
        _counted(torch._ops.OpOverload, "__call__", lambda operator: operator.namespace == "fusednn") as dispatched,
    ):
        call()
    return {"launches": launched, "prepared": len(prepared), "dispatched": len(dispatched)}


def _increase(call: Callable[[], object], launches: Callable[[], int]) -> int:
    before = launches()
    call()
    return launches() - before


def _entered(call: Callable[[], object]) -> int:
    """Launches that Triton tells its hooks of."""
    from triton import knobs

    hook = mock.Mock()
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        call()
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    return hook.call_count


@contextmanager
def _counted(owner: type, name: str, counts: Callable[[Any], bool] = lambda receiver: True) -> Iterator[list[None]]:
    """A list that grows with every call of a method, of receivers that count."""
    method = getattr(owner, name)
    calls: list[None] = []

    def counting(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if counts(self):
            calls.append(None)
        return method(self, *args, **kwargs)

    with mock.patch.object(owner, name, counting):
        yield calls


if __name__ == "__main__":
    sys.exit(main())
