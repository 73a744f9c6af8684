"""``python -m fusednn bench one gelu --shape 4096x4096``: operations of the catalogue beside PyTorch's."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..benchmark import one
from ..benchmark.one import MEMORY_FORMATS
from ..benchmark.protocol import COMPILE_MODES, DIRECTIONS
from ..catalogue import ROWS

__all__ = ["main"]

_DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}


def main(arguments: Sequence[str]) -> int:
    """Returns 0 where all was measured, 1 where something was refused, 2 for what can't be asked."""
    parser = argparse.ArgumentParser(
        prog="fusednn bench one",
        description="Operations of the catalogue beside PyTorch's: times on a GPU, bytes anywhere.  Several sweep.",
        epilog=f"Operations: {', '.join(dict.fromkeys(row.name for row in ROWS))}.",
    )
    parser.add_argument("operations", metavar="operation", nargs="+")
    parser.add_argument("--shape", type=_shape, nargs="+", metavar="4096x4096", help="of the first operand")
    parser.add_argument("--dtype", choices=_DTYPES, nargs="+", default=["bfloat16"], help="(default: bfloat16)")
    parser.add_argument("--against", type=_words, default=["eager"], help=f"eager, {', '.join(COMPILE_MODES)} (eager)")
    parser.add_argument("--memory-format", choices=MEMORY_FORMATS, nargs="+", default=["contiguous"])
    parser.add_argument("--direction", choices=DIRECTIONS, nargs="+", default=list(DIRECTIONS), help="(default: all)")
    parser.add_argument("--warm", action="store_true", help="the same inputs again and again, in the cache")
    parser.add_argument("--json", action="store_true", help="print JSON, with all samples")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw the sweep; needs matplotlib")
    parsed = parser.parse_args(arguments)
    try:
        sweep = one(
            parsed.operations,
            parsed.shape,
            [_DTYPES[name] for name in parsed.dtype],
            against=parsed.against,
            memory_formats=parsed.memory_format,
            directions=parsed.direction,
            cold=not parsed.warm,
            progress=_show if sys.stderr.isatty() else lambda text: None,
        )
        print(json.dumps(sweep.to_dict(), indent=1) if parsed.json else sweep)
        if parsed.draw:
            sweep.draw(parsed.draw)
    except (ValueError, ImportError) as error:
        print(f"fusednn bench one: {error}", file=sys.stderr)
        return 2
    return 1 if any(measurement.refused for measurement in sweep) else 0


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x"))


def _words(text: str) -> list[str]:
    return text.split(",")


def _show(text: str) -> None:
    print(f"\r{text}".ljust(60), end="\r", file=sys.stderr, flush=True)
