"""Seeds that follow from a generator's own seed and offset: no launch, and the same numbers wherever it was before."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from support.baseline import BENCH  # noqa: F401  (makes the benchmarks importable)
from support.device import DEVICE, ON_GPU
from torch import Tensor

from fusednn import autograd as F
from fusednn.kernels.base import random
from fusednn.kernels.base.random import with_seed

_DEVICE = torch.device(DEVICE, torch.cuda.current_device()) if ON_GPU else torch.device(DEVICE)


def _drawn(device: torch.device, seed: int, offset: int) -> tuple[Tensor, ...]:
    """A block as the device would draw it, of a CPU's generator."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + offset)
    return torch.randint(2**62, (random._BLOCK, 1), generator=generator).unbind()


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The device's; a stand-in where there is no GPU."""
    random._blocks.clear()
    if ON_GPU:
        yield torch.cuda.default_generators[_DEVICE.index]  # type: ignore[misc]
    else:
        from fusednn_bench.do_nothing import CountingGenerator

        found = CountingGenerator(seed=7)
        monkeypatch.setattr(random, "counting_generator", lambda device: found)
        monkeypatch.setattr(random, "_drawn", _drawn)
        yield found
    random._blocks.clear()


def _draw(count: int = 1) -> list[int]:
    return [int(with_seed(_DEVICE, lambda seed: seed)) for _ in range(count)]


def test_draws_advance_the_generator_and_differ(generator: Any) -> None:
    before = generator.get_offset()
    seeds = _draw(2 * random._BLOCK + 3)
    assert len(set(seeds)) == len(seeds)
    assert generator.get_offset() == before + 4 * len(seeds)


def test_a_block_is_drawn_once(generator: Any) -> None:
    with mock.patch.object(random, "_drawn", wraps=random._drawn) as drawn:
        _draw(random._BLOCK)
    assert drawn.call_count == 1 + (generator.get_offset() % (4 * random._BLOCK) != 0)


def test_the_same_offset_has_the_same_seed(generator: Any) -> None:
    """As checkpointing wants it, whose second pass goes back, and whatever has been drawn, or forgotten, between."""
    before = generator.get_offset()
    seeds = _draw(5)
    generator.set_offset(before + 4 * 5000)
    others = _draw(5)
    random._blocks.clear()
    generator.set_offset(before)
    assert _draw(5) == seeds
    generator.set_offset(before + 4 * 5000)
    assert _draw(5) == others
    assert not set(seeds) & set(others)


def test_others_may_draw_between(generator: Any) -> None:
    first = _draw(1)
    generator.set_offset(generator.get_offset() + 12)  # as a kernel of PyTorch's does
    assert _draw(1) != first


def test_another_seed_has_other_seeds(generator: Any) -> None:
    before, first = generator.get_offset(), _draw(4)
    if ON_GPU:
        torch.cuda.manual_seed(1)
    else:
        generator.seed = 1
    generator.set_offset(before)
    assert not set(first) & set(_draw(4))


def test_what_fails_has_drawn_nothing(generator: Any) -> None:
    def fails(seed: Tensor) -> None:
        raise MemoryError

    before = generator.get_offset()
    with pytest.raises(MemoryError):
        with_seed(_DEVICE, fails)
    assert generator.get_offset() == before


def test_blocks_are_few(generator: Any) -> None:
    for place in range(random._MOST_BLOCKS + 3):
        generator.set_offset(4 * random._BLOCK * place)
        _draw()
        assert 0 < len(random._blocks) <= random._MOST_BLOCKS


@pytest.mark.gpu
def test_each_stream_has_a_block(generator: Any) -> None:
    """What one draws, another mustn't read before it is drawn."""
    before, first = generator.get_offset(), _draw()
    generator.set_offset(before)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert _draw() == first
    assert len(random._blocks) == 2


def test_a_block_of_inference_serves_training(generator: Any) -> None:
    with torch.inference_mode():
        first = with_seed(_DEVICE, lambda seed: seed)
    assert not first.is_inference()
    x = torch.ones(6, device=DEVICE, requires_grad=True)
    F.dropout(x, 0.5).sum().backward()


@pytest.mark.kernels
@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.dropout(x, 0.5),
        lambda x: F.alpha_dropout(x, 0.5, True),
        lambda x: F.dropout1d(x, 0.5),
        lambda x: F.rrelu(x, training=True),
        lambda x: F.standout(x, x, training=True),
        lambda x: F.bias_activation_dropout(x, torch.zeros(8, device=DEVICE), p=0.5, training=True),
    ],
    ids=["dropout", "alpha_dropout", "dropout1d", "rrelu", "standout", "bias_activation_dropout"],
)
def test_functions_draw_without_the_device(call: Callable[[Tensor], Tensor], generator: Any) -> None:
    x = torch.randn(4, 8, device=DEVICE)
    before = generator.get_offset()
    with mock.patch.object(random, "draw_seed", side_effect=AssertionError("drawn on the device")):
        results = [call(x) for _ in range(3)]
        assert generator.get_offset() == before + 12
        generator.set_offset(before)
        assert torch.equal(call(x), results[0])
    assert not torch.equal(results[0], results[1])


def test_compiled_code_draws_on_the_device(generator: Any) -> None:
    found: list[str] = []

    def names(gm: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        found.extend(str(node.target) for node in gm.graph.nodes)
        return gm

    before = generator.get_offset()
    torch.compile(lambda x: with_seed(_DEVICE, lambda seed: x + seed), backend=names, fullgraph=True)(
        torch.ones(1, device=DEVICE)
    )
    assert any("randint" in name for name in found)
    assert ON_GPU or generator.get_offset() == before


@pytest.mark.gpu
def test_a_captured_graph_draws_in_each_replay() -> None:
    x = torch.ones(4096, device=DEVICE)
    F.dropout(x, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = F.dropout(x, 0.5)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)


def test_cpus_draw_as_ever() -> None:
    torch.manual_seed(3)
    expected = int(random.draw_seed(torch.device("cpu")))
    torch.manual_seed(3)
    assert int(with_seed(torch.device("cpu"), lambda seed: seed)) == expected
