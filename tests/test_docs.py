"""Documents that are generated from the code, and examples in them, are up to date."""

import importlib.util
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

import fusednn
from fusednn.layers.fusion.patterns import PATTERNS
from fusednn.layers.replacement import register

ROOT = Path(__file__).resolve().parent.parent


def generator(name: str) -> object:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def support_table() -> object:
    return generator("support_table")


def test_support_table_is_current(support_table: object) -> None:
    text = support_table.PAGE.read_text()
    assert support_table.updated(text) == text, "run: python docs/support_table.py"


def test_support_table_has_a_row_per_layer(support_table: object) -> None:
    rows = support_table.support_table().splitlines()[2:]
    exported = [getattr(fusednn.layers, name) for name in fusednn.layers.__all__]
    assert len(rows) == sum(isinstance(item, type) and issubclass(item, nn.Module) for item in exported)
    assert "| `ReLU` | `relu` | 1 bit an element | 2e + 1/8 | 2e + 1/8 |" in rows


def test_optimizer_table_has_every_optimizer(support_table: object) -> None:
    rows = support_table.optimizer_table().splitlines()[2:]
    named = {row.split("`")[1] for row in rows}
    assert named == {cls.__name__ for cls in fusednn.optim.FusedOptimizer.__subclasses__()}
    assert "| `AdamW` | amsgrad | `exp_avg`, `exp_avg_sq`, `max_exp_avg_sq` | 9e |" in rows


def test_the_list_of_patterns_is_current() -> None:
    patterns = generator("patterns")
    text = patterns.PAGE.read_text()
    assert patterns.page() == text, "run: python docs/patterns.py"
    assert text.count("\n## ") == len(PATTERNS) + 1
    assert "- Apart where: the residual is unlike the input." in text


def test_the_readmes_first_example(device: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).to(device)
    fusednn.replace_layers(model)
    assert "relu" in str(fusednn.explain(model, torch.ones(2, 4, device=device)))


DOCUMENTS = tuple(path.stem for path in sorted((ROOT / "docs").glob("*.md")))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in DOCUMENTS)])
def test_links_point_to_files(document: str) -> None:
    path = ROOT / document
    targets = [part.partition(")")[0] for part in path.read_text().split("](")[1:]]
    local = [target for target in targets if not target.startswith("http")]
    assert all((path.parent / target).exists() for target in local), local


@pytest.mark.parametrize(("page", "number"), [("exact-classes", 3), ("libraries", 3)])
def test_the_examples_of_a_page(page: str, number: int) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    examples = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    assert len(examples) == number
    with mock.patch.dict(register._registered):
        for example in examples:
            exec(example, {"nn": nn, "torch": torch, "fusednn": fusednn})
