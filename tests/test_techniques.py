"""The page of techniques: its examples run, and what it says serves a technique exists."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fusednn

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "techniques.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.stock
def test_examples_run() -> None:
    assert len(BLOCKS) == PAGE.count("```python")
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "docs/techniques.md", "exec"), names)


@pytest.mark.stock
def test_what_serves_a_technique_exists() -> None:
    found = {"layers": fusednn.layers, "optim": fusednn.optim, "nn": nn, "torch": torch}
    served = re.findall(r"`((?:layers|optim|nn|torch)(?:\.\w+)+)", PAGE)
    assert len(served) > 60
    for path in served:
        first, *names = path.split(".")
        thing = found[first]
        for name in names:
            thing = getattr(thing, name)
