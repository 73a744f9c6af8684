"""Chains whose layers are asked again only when something about them has changed."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fusednn
from fusednn.layers.fusion.unchanged import while_unchanged


class _Asked:
    """A refusal that counts how often it is asked, and refuses layers that are heard."""

    def __init__(self) -> None:
        self.count = 0
        self.refusal = while_unchanged(self._refusal)

    def _refusal(self, *layers: Any) -> str | None:
        self.count += 1
        heard = any(isinstance(layer, nn.Module) and layer._forward_hooks for layer in layers)
        return "heard" if heard else None


def _chain() -> list[Any]:
    return [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.LeakyReLU(0.1), None, ("relu", ())]


class _Other(nn.Conv2d):
    pass


def _forget(layer: Any, name: str) -> None:
    del layer.__dict__[name]
    layer.other = 1


CHANGES: dict[str, Callable[[list[Any]], object]] = {
    "hook": lambda layers: layers[1].register_forward_hook(lambda *_: None),
    "hook before": lambda layers: layers[2].register_forward_pre_hook(lambda *_: None),
    "hook of gradients": lambda layers: layers[0].register_full_backward_hook(lambda *_: None),
    "forward": lambda layers: setattr(layers[0], "forward", lambda x: x),
    "class": lambda layers: setattr(layers[0], "__class__", _Other),
    "code": lambda layers: layers[1].__class__,  # changed below
    "mode": lambda layers: layers[1].eval(),
    "slope": lambda layers: setattr(layers[2], "negative_slope", 0.2),
    "type": lambda layers: setattr(layers[2], "negative_slope", torch.tensor(0.1)),
    "stride": lambda layers: setattr(layers[0], "stride", (2, 2)),
    "attribute": lambda layers: setattr(layers[0], "more", 1),
    "another attribute": lambda layers: _forget(layers[2], "negative_slope"),
    "layer": lambda layers: layers.__setitem__(2, nn.LeakyReLU(0.1)),
    "none": lambda layers: layers.__setitem__(2, None),
    "function": lambda layers: layers.__setitem__(4, ("relu6", ())),
}


@pytest.mark.whole
@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers_are_asked_again(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, layers = _Asked(), _chain()
    for _ in range(3):
        assert asked.refusal(*layers) is None
    assert asked.count == 1
    CHANGES[change](layers)
    if change == "code":
        monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: x)
    reason = asked.refusal(*layers)
    assert asked.count == 2
    assert reason == ("heard" if change == "hook" else None)


def test_a_reason_is_found_anew_each_time() -> None:
    asked, layers = _Asked(), _chain()
    handle = layers[0].register_forward_hook(lambda *_: None)
    for count in (1, 2):
        assert asked.refusal(*layers) == "heard"
        assert asked.count == count
    handle.remove()
    for _ in range(2):
        assert asked.refusal(*layers) is None
    assert asked.count == 3


def test_what_changes_in_place_is_never_remembered() -> None:
    asked, layers = _Asked(), _chain()
    layers[0].padding = [1, 1]
    for count in (1, 2):
        asked.refusal(*layers)
        assert asked.count == count


def test_a_copy_is_another_layer() -> None:
    asked, layers = _Asked(), _chain()
    asked.refusal(*layers)
    asked.refusal(*copy.deepcopy(layers))
    assert asked.count == 2


def test_layers_are_not_held() -> None:
    asked, layers = _Asked(), _chain()
    asked.refusal(*layers)
    held = weakref.ref(layers[0])
    del layers
    gc.collect()
    assert held() is None


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()), (2, 2, 5, 5)),
        (lambda: nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()), (2, 2, 5, 5)),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Dropout(0.0)), (2, 4)),
    ],
    ids=["conv", "norm", "linear"],
)
def test_a_hook_is_heard_in_a_chain_that_has_run(
    build: Callable[[], nn.Sequential], shape: tuple[int, ...], device: str
) -> None:
    model, x, heard = build().to(device), torch.randn(shape, device=device), []
    fusednn.replace_layers(model, fuse=True)
    for _ in range(3):
        model(x)
    handle = model[-1].register_forward_hook(lambda *_: heard.append(1))
    model(x)
    assert heard == [1]
    handle.remove()
    model(x)
    assert heard == [1]
