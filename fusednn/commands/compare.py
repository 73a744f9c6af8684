"""``python -m fusednn compare module:function``: the caller's own model, stock beside replaced and fused copies."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import comparison

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="module:function",
        help="a function of no arguments that returns the arguments of fusednn.compare: a dictionary, or a tuple of "
        "model, make_batch and perhaps loss and optimizer",
    )
    parser.add_argument("--steps", type=int, default=3, help="after which parameters are compared (%(default)s)")
    parser.add_argument("--timed-steps", type=int, default=20, help="of each copy (%(default)s; 0: no times)")
    parser.add_argument("--compiled", action="store_true", help="also time copies under torch.compile")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw bars of time and memory; needs matplotlib")


def run(arguments: argparse.Namespace) -> int:
    """Returns 0 where all copies are right or nothing could be compared, 1 where one is wrong, 2 for a bad target."""
    try:
        given = _given(arguments.target)
    except (ImportError, AttributeError, ValueError) as error:
        print(f"fusednn compare: {arguments.target}: {error}", file=sys.stderr)
        return 2
    found = comparison.compare(
        **given,
        steps=arguments.steps,
        timed_steps=arguments.timed_steps,
        compiled=arguments.compiled,
        progress=_progress(arguments.timed_steps) if sys.stderr.isatty() else lambda text: None,
    )
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found)
    if arguments.draw:
        found.draw(arguments.draw)
    return 1 if found.right is False else 0


def _given(target: str) -> dict[str, Any]:
    module, _, function = target.partition(":")
    if not function:
        raise ValueError("not of the form module:function")
    sys.path.insert(0, str(Path.cwd()))
    made = getattr(import_module(module), function)()
    if isinstance(made, Mapping):
        return dict(made)
    return dict(zip(("model", "make_batch", "loss", "optimizer"), made, strict=False))


def _progress(timed_steps: int) -> Any:
    done = 0

    def show(text: str) -> None:
        nonlocal done
        done += text == "times"
        bar = f" {done} of {timed_steps + 2}" if text == "times" else ""
        print(f"\r{text}{bar}".ljust(60), end="" if done < timed_steps + 2 else "\n", file=sys.stderr, flush=True)

    return show
