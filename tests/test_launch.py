"""Remembered launches: whatever changes between two of them, the second gets the kernel that Triton would give it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fusednn import kernels
from fusednn.kernels.base import launch as launching
from fusednn.kernels.base.device import Device
from fusednn.kernels.base.launch import TRITON_TYPE, Configuration, remembering

pytestmark = [pytest.mark.compiles, pytest.mark.smoke]

CONFIGURATIONS = list(kernels.shipped()) if kernels.AVAILABLE and not kernels.INTERPRETING else []
OF_EACH_KERNEL = list({configuration.kernel: configuration for configuration in CONFIGURATIONS}.values())
each_kernel = pytest.mark.parametrize("configuration", OF_EACH_KERNEL, ids=lambda c: c.label)


TORCH_TYPE = {name: dtype for dtype, name in TRITON_TYPE.items()}


class Launched(NamedTuple):
    """What a driver is asked for: the kernel that Triton made for ``key``, and its arguments."""

    key: str
    programs: int
    stream: int
    arguments: tuple[Any, ...]


class Machine:
    """Triton as it is, but that its kernels aren't compiled, and that its driver notes what is launched."""

    def __init__(self) -> None:
        self.device = -1  # where CPU tensors say that they are
        self.stream = 7
        self.launched: list[Launched] = []
        self.prepared_by_triton = 0

    def compiled(self, key: str) -> Any:
        """In place of Triton's `CompiledKernel`."""

        def run(x: int, y: int, z: int, stream: int, function: str, packed: str, *rest: Any) -> None:
            assert (y, z, function, packed) == (1, 1, key, "packed")
            self.launched.append(Launched(key, x, stream, rest[3:]))  # behind metadata and hooks

        return SimpleNamespace(run=run, function=key, packed_metadata="packed", launch_metadata=lambda *_: None)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    machine = Machine()
    run = JITFunction.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        machine.prepared_by_triton += 1
        return run(*args, **kwargs)

    active = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: machine.device,
        get_current_stream=lambda device: machine.stream,
    )
    monkeypatch.setattr(driver, "_active", active)
    monkeypatch.setattr(launching, "device_of", lambda tensor: Device("sm_90", 32, 232_448))
    monkeypatch.setattr(JITFunction, "run", counted)
    monkeypatch.setattr(JITFunction, "_do_compile", lambda function, key, *_: machine.compiled(key))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: machine.device, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: machine.stream, raising=False)
    yield machine
    for configuration in OF_EACH_KERNEL:
        configuration.kernel.device_caches.clear()


#: What Triton makes kernels of their own for, and their neighbours.
INTEGERS = (0, 1, 2, 15, 16, 17, 2**31 - 1, 2**31, 2**31 + 16, 2**40)


def arguments_of(configuration: Configuration, draw: random.Random) -> list[Any]:
    """Run-time arguments as launchers might give them."""

    def argument(kind: str) -> Any:
        if kind.startswith("*"):
            memory = torch.empty(64, dtype=TORCH_TYPE[kind[1:]])
            return memory[draw.choice((0, 16 // memory.itemsize, 1)) :]
        return draw.choice(INTEGERS) if kind[0] in "iu" else draw.random()

    return [argument(kind) for _, kind in configuration.signature]


def key_of(configuration: Configuration, arguments: list[Any]) -> str:
    """Triton's own key of the kernel that it makes for these arguments."""
    given = dict(zip(configuration.names, arguments, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(configuration.kernel), "_do_compile", lambda function, key, *_: SimpleNamespace(key=key))
        compiled = configuration.kernel.run(grid=None, warmup=True, **given, **configuration.keywords_for(arguments))
    return str(compiled.key)


@each_kernel
def test_gives_the_kernel_that_triton_would(configuration: Configuration, machine: Machine) -> None:
    launcher, draw = remembering(configuration), random.Random(0)
    alike = [arguments_of(configuration, draw) for _ in range(40)]
    for programs, arguments in enumerate(alike * 2, start=1):
        launcher(programs, *arguments)
        launched = machine.launched.pop()
        assert launched.key == key_of(configuration, arguments)
        assert (launched.programs, launched.stream) == (programs, machine.stream)
        given = [each.data_ptr() if isinstance(each, Tensor) else each for each in launched.arguments]
        values = dict(zip((each.name for each in configuration.kernel.params), given, strict=True))
        assert [values.pop(name) for name in configuration.names] == [
            each.data_ptr() if isinstance(each, Tensor) else each for each in arguments
        ]
        constants = dict(configuration.constants)
        if configuration.aligned:
            del values["ALIGN"], constants["ALIGN"]  # compiled in: it is of the arguments, and in the key
        assert values == constants


@each_kernel
def test_asks_triton_once(configuration: Configuration, machine: Machine) -> None:
    launcher, arguments = remembering(configuration), arguments_of(configuration, random.Random(0))
    for _ in range(3):
        launcher(5, *arguments)
    assert machine.prepared_by_triton == 1
    assert len(machine.launched) == 3


@pytest.fixture
def relu() -> tuple[Any, list[Any]]:
    """A launcher, and arguments for it."""
    configuration = next(each for each in CONFIGURATIONS if each.label == "relu forward fp32")
    return remembering(configuration), arguments_of(configuration, random.Random(0))


def test_takes_the_current_stream(machine: Machine, relu: tuple[Any, list[Any]]) -> None:
    launcher, arguments = relu
    for machine.stream in (7, 8, 7):
        launcher(1, *arguments)
    assert [each.stream for each in machine.launched] == [7, 8, 7]
    assert machine.prepared_by_triton == 1


def test_another_device_is_tritons(machine: Machine, relu: tuple[Any, list[Any]]) -> None:
    """The tensors' device isn't the current one: what is remembered of one is nothing to the other."""
    launcher, arguments = relu
    for machine.device in (-1, 1, -1, 1):
        launcher(1, *arguments)
    assert machine.prepared_by_triton == 3


def test_each_device_has_its_own(machine: Machine, relu: tuple[Any, list[Any]]) -> None:
    launcher, arguments = relu

    class OnAnotherDevice(Tensor):
        def get_device(self) -> int:
            return 1

    elsewhere = [each.as_subclass(OnAnotherDevice) if isinstance(each, Tensor) else each for each in arguments]
    for machine.device, given in ((-1, arguments), (1, elsewhere)) * 3:
        launcher(1, *given)
    assert machine.prepared_by_triton == 2


def test_hooks_that_come_later_are_called(machine: Machine, relu: tuple[Any, list[Any]]) -> None:
    from triton import knobs

    launcher, arguments = relu
    launcher(1, *arguments)
    chains = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    before = launcher.__globals__["_before"]  # `JITFunction.pre_run_hooks`
    for hooks, add, remove in (
        *((chain.calls, chain.add, chain.remove) for chain in chains),
        (before, before.append, before.remove),
    ):
        add(hook := lambda *args, **kwargs: None)
        assert hooks == [hook]
        machine.prepared_by_triton = 0
        launcher(1, *arguments)
        assert machine.prepared_by_triton == 1
        remove(hook)
        launcher(1, *arguments)
        assert machine.prepared_by_triton == 1


@pytest.mark.parametrize(
    ("knobs", "name", "value"),
    [
        ("runtime", "launch_enter_hook", lambda metadata: None),
        ("runtime", "debug", True),
        ("compilation", "instrumentation_mode", "other"),
    ],
)
def test_settings_that_change_are_tritons(
    knobs: str, name: str, value: Any, machine: Machine, relu: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    launcher, arguments = relu
    with monkeypatch.context() as patch:
        patch.setitem(vars(getattr(triton.knobs, knobs)), name, value)
        launcher(1, *arguments)
        launcher(1, *arguments)
        assert machine.prepared_by_triton == 2
    launcher(1, *arguments)
    launcher(1, *arguments)
    assert machine.prepared_by_triton == 3  # nothing was remembered of what was compiled in another mode
    assert len({each.key for each in machine.launched}) == 1 + (name != "launch_enter_hook")


def test_memory_is_bounded(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = next(each for each in CONFIGURATIONS if each.label.startswith("softmax"))
    launcher, draw = remembering(configuration), random.Random(0)
    monkeypatch.setattr(launching, "_MOST_REMEMBERED", 4)
    for _ in range(50):
        launcher(1, *arguments_of(configuration, draw))
        assert len(launcher.__globals__["_remembered"]) <= 4
