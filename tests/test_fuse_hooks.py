"""Fused neighbours, and hooks that come and go after they were fused: each hears what it hears of stock's layers."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from support.device import KERNELS_RUN
from support.fusion import PATTERNS, batch, make
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

import fusednn
from fusednn.layers.fusion.members import observe_chains

Record = Callable[[], None]

HOOKS: dict[str, Callable[[nn.Module, Record], Any]] = {
    "forward": lambda layer, record: layer.register_forward_hook(lambda *_: record()),
    "forward with kwargs": lambda layer, record: layer.register_forward_hook(lambda *_: record(), with_kwargs=True),
    "forward, always": lambda layer, record: layer.register_forward_hook(lambda *_: record(), always_call=True),
    "pre": lambda layer, record: layer.register_forward_pre_hook(lambda *_: record()),
    "pre with kwargs": lambda layer, record: layer.register_forward_pre_hook(lambda *_: record(), with_kwargs=True),
    "backward": lambda layer, record: layer.register_full_backward_hook(lambda *_: record()),
    "pre-backward": lambda layer, record: layer.register_full_backward_pre_hook(lambda *_: record()),
    "old backward": lambda layer, record: layer.register_backward_hook(lambda *_: record()),
}
OF_ALL: dict[str, Callable[[Any], Any]] = {
    "forward": module_hooks.register_module_forward_hook,
    "pre": module_hooks.register_module_forward_pre_hook,
    "backward": module_hooks.register_module_full_backward_hook,
    "pre-backward": module_hooks.register_module_full_backward_pre_hook,
}


def call(model: nn.Module, x: Tensor) -> str | None:
    """Forward and backward; what it raises, as stock does where an output that is hooked is changed in place."""
    try:
        model((x * 1).requires_grad_()).sum().backward()
    except RuntimeError as error:
        return type(error).__name__
    return None


@contextmanager
def counting_chains() -> Iterator[list[int]]:
    counts: list[int] = []
    with observe_chains(lambda layers, refusal: counts.append(len(layers)) if layers and not refusal else None):
        yield counts


def cases() -> Iterator[Any]:
    """Every member of every chain, with kinds of hooks in turn: one each; thoroughly, all."""
    for start, name in enumerate(PATTERNS):
        yield pytest.param(name, (start,), id=name)
        others = tuple(start + number for number in range(1, len(HOOKS)))
        yield pytest.param(name, others, id=f"{name}, other kinds", marks=pytest.mark.thorough)


@pytest.mark.whole
@pytest.mark.parametrize(("name", "numbers"), list(cases()))
def test_a_hook_on_any_member(name: str, numbers: tuple[int, ...], device: str) -> None:
    build, shape, _ = PATTERNS[name]
    stock = make(build(), device)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    x = batch(*shape, device=device)
    with counting_chains() as before, torch.no_grad():
        model(x)
    assert before or not KERNELS_RUN
    kinds = list(HOOKS)
    for place, member in enumerate(path for path, layer in stock.named_modules() if not list(layer.children())):
        for kind in (kinds[(place + number) % len(kinds)] for number in numbers):
            heard: dict[nn.Module, list[int]] = {stock: [], model: []}
            handles, raised = [], []
            for one, calls in heard.items():
                handles.append(HOOKS[kind](one.get_submodule(member), lambda calls=calls: calls.append(1)))
                raised.append(call(one, x))
            for handle in handles:
                handle.remove()
            for one in heard:  # PyTorch remembers of which kind a layer's backward hooks were, and takes no other
                one.get_submodule(member)._is_full_backward_hook = None
            assert raised[0] == raised[1], (member, kind)
            assert heard[model] == heard[stock], (member, kind)
            assert heard[stock] or raised[0], (member, kind)
        heard[model].clear()
        with counting_chains() as after, torch.no_grad():
            model(x)
        assert not heard[model], member
        assert after == before, member


def cases_of_all_modules() -> Iterator[Any]:
    """Each kind with one chain; thoroughly, with the others."""
    names = ("conv, norm, act, pool", "linear, act, dropout", "linear, pool of pieces", "norm, act")
    for (place, name), (number, kind) in product(enumerate(names), enumerate(OF_ALL)):
        yield pytest.param(name, kind, marks=() if place == number else pytest.mark.thorough)


@pytest.mark.parametrize(("name", "kind"), list(cases_of_all_modules()))
def test_a_hook_on_all_modules(name: str, kind: str, device: str) -> None:
    build, shape, _ = PATTERNS[name]
    stock = make(build(), device)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    x = batch(*shape, device=device)
    with counting_chains() as before:
        call(model, x)
    heard: dict[str, list[str]] = {}
    for label, one in (("stock", stock), ("model", model)):
        calls = heard[label] = []
        names = {layer: path for path, layer in one.named_modules()}
        handle = OF_ALL[kind](lambda layer, *_, names=names, calls=calls: calls.append(names[layer]))
        call(one, x)
        handle.remove()
    assert heard["model"] == heard["stock"]
    assert len(heard["stock"]) > 1
    with counting_chains() as after:
        call(model, x)
    assert after == before
