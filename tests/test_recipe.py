"""docs/recipe.md: it says what its data say, and the data are what training gives."""

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fusednn

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["squared error", "cross-entropy", "9 layers, sigmoid", "9 layers, ReLU"]
NAMES += ["+ Adam", "+ batch norm", "+ maxout", "+ dropout"]
QUICK = ("squared error", "+ Adam", "+ dropout")


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "docs" / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["recipe"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(recipe: ModuleType) -> dict[str, Any]:
    return json.loads(recipe.DATA.read_text())


def test_the_document_is_written_from_the_data(recipe: ModuleType, data: dict[str, Any]) -> None:
    assert recipe.DOCUMENT.read_text() == recipe.document(data), "run: python docs/recipe.py --render"


def test_the_plots_are_of_the_data(recipe: ModuleType, data: dict[str, Any]) -> None:
    image = pytest.importorskip("PIL.Image")
    for name in ("agreement", "differences", "training"):
        with image.open(recipe.PLOTS / f"{name}.png") as plot:
            assert plot.text["Description"] == recipe.digest(data), "run: python docs/recipe.py --render"


def test_the_data_are_of_this_ladder(recipe: ModuleType, data: dict[str, Any]) -> None:
    assert [rung.name for rung in recipe.LADDER] == NAMES
    assert [rung["rung"] for rung in data["rungs"]] == [asdict(rung) for rung in recipe.LADDER]
    assert {len(rung["training"]["losses"]) for rung in data["rungs"]} == {recipe.STEPS}
    assert {len(rung["agreement"]["fusednn"]) for rung in data["rungs"]} == {recipe.AGREEMENT_STEPS}


def test_the_data_agree(recipe: ModuleType, data: dict[str, Any]) -> None:
    for rung in data["rungs"]:
        name, agreement = rung["rung"]["name"], rung["agreement"]
        assert max(recipe.differences(rung)[:5]) < 16 * recipe.EPSILON, name
        assert agreement["kernels"], name
        assert not agreement["stock operators"], name
        if name != "+ dropout":  # whose whole training drew its own masks
            begun = rung["training"]["losses"][: recipe.AGREEMENT_STEPS]
            assert agreement["stock"] == pytest.approx(begun, rel=1e-3), name


@pytest.mark.stock
@pytest.mark.parametrize("name", NAMES)
def test_trainings_begin_as_the_data_say(name: str, recipe: ModuleType, data: dict[str, Any]) -> None:
    index = NAMES.index(name)
    losses = recipe.train_stock(recipe.LADDER[index], steps=3)["losses"]
    assert losses == pytest.approx(data["rungs"][index]["training"]["losses"][:3], rel=1e-4)


@pytest.mark.kernels
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.thorough) for name in NAMES]
)
def test_kernels_agree(name: str, recipe: ModuleType, data: dict[str, Any], device: str) -> None:
    if device != "cpu":
        pytest.skip("the ladder is trained on the CPU")
    index = NAMES.index(name)
    outcome = recipe.compare(recipe.LADDER[index], steps=2)
    assert max(recipe.differences({"agreement": outcome})) < 16 * recipe.EPSILON
    assert outcome["kernels"] == data["rungs"][index]["agreement"]["kernels"]


def test_dropout_masks_are_repeated(recipe: ModuleType) -> None:
    """Also where the input is zero, which hides what the mask was."""
    dropout, masks = nn.Dropout(0.5), []
    fusednn.replace_layers(dropout)
    dropout.register_forward_pre_hook(recipe.record_masks(masks))
    x = torch.randn(30, 40).relu()
    y = dropout(x)
    assert 0 < (masks[0] == 0).float().mean() < 1
    torch.testing.assert_close(recipe.RepeatedDropout(masks)(x), y)
