"""docs/migrating.md: its difference is that of two scripts, which both run, agree, and exchange checkpoints."""

import importlib.util
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.device import KERNELS_RUN
from torch import nn

import fusednn
from fusednn.layers.twin import TWINS

ROOT = Path(__file__).resolve().parents[1]
LOSSES = [cls for name, cls in vars(nn).items() if name.endswith("Loss") and cls is not nn.AdaptiveLogSoftmaxWithLoss]


@pytest.fixture(scope="module")
def document() -> ModuleType:
    spec = importlib.util.spec_from_file_location("migrating", ROOT / "docs" / "migrating.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(name: str) -> dict[str, Any]:
    pytest.importorskip("sklearn")
    return runpy.run_path(str(ROOT / "examples" / "migrating" / f"{name}.py"))


def test_the_document_shows_the_difference(document: ModuleType) -> None:
    text = document.DOCUMENT.read_text()
    assert document.updated(text) == text, "run: python docs/migrating.py"


def test_at_most_five_lines_change(document: ModuleType) -> None:
    lines = document.difference().splitlines()[2:]
    assert 0 < sum(line.startswith("+") for line in lines) <= 5
    assert sum(line.startswith("-") for line in lines) <= 5


def test_both_scripts_give_the_same_losses(tmp_path: Path) -> None:
    size = {"steps": 3, "batch_size": 8} if KERNELS_RUN else {"steps": 20, "batch_size": 32}
    losses, states = [], []
    for name in ("before", "after"):
        losses.append(script(name)["main"](**size, checkpoint=tmp_path / name))
        states.append(torch.load(tmp_path / name, weights_only=True))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if KERNELS_RUN else 0)
    assert len(set(losses[0])) == size["steps"]  # it trains
    build = script("before")["build_model"]
    for state in states:
        model = build()
        model.load_state_dict(state["model"])
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.load_state_dict(state["optimizer"])
        assert optimizer.state_dict()["state"].keys() == state["optimizer"]["state"].keys()


def test_the_documents_examples_run(document: ModuleType, device: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU()).to(device)
    labels = torch.tensor([1, 2], device=device)
    known = {"fusednn": fusednn, "nn": nn, "torch": torch, "model": model, "labels": labels}
    known["images"] = torch.randn(2, 1, 8, 8, device=device)
    examples = [block.partition("```")[0] for block in document.DOCUMENT.read_text().split("```python\n")[1:]]
    assert len(examples) == 3
    for example in examples:
        exec(example, known)
    assert type(known["optimizer"]) is fusednn.optim.AdamW
    torch.testing.assert_close(known["loss"], known["criterion"](model(known["images"]), labels))


@pytest.mark.parametrize("cls", LOSSES, ids=lambda cls: cls.__name__)
def test_replaces_every_loss_that_has_a_twin(cls: type[nn.Module]) -> None:
    loss = cls(8, 5) if cls.__name__ == "LinearCrossEntropyLoss" else cls()
    report = fusednn.replace_layers(loss)
    if cls in TWINS:
        assert type(loss) is TWINS[cls]
        assert len(report.replaced) == 1
    else:
        assert type(loss) is cls
        assert [row.reason for row in report.left] == ["no fusednn twin"]


def test_the_usual_losses_have_twins() -> None:
    names = {cls.__name__ for cls in LOSSES if cls in TWINS}
    usual = "CrossEntropyLoss NLLLoss MSELoss L1Loss SmoothL1Loss HuberLoss BCELoss BCEWithLogitsLoss KLDivLoss"
    assert set(usual.split()) <= names
