"""How kernels are configured, registered and launched.

What a kernel's arguments are stands in the kernel alone: `kernel` and `configure` read it off.  A `Configuration` is
everything that the compiler is told: the kernel, the types of its arguments, its constants and its threads.  Launchers
get theirs from the same functions that a family registers with `ships`, so the compile check and the tests see exactly
the code that users run.
"""

from __future__ import annotations

import inspect
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import gcd
from typing import Any

import torch

from ._triton import INTERPRETING, ON_CPU, tl, triton
from .device import Device, device_of, device_refusal, refuse

__all__ = [
    "ACCUMULATOR",
    "ALIGNMENT",
    "COMPUTE",
    "DTYPES",
    "ON_CPU",
    "TRITON_TYPE",
    "Configuration",
    "DeviceAssertionError",
    "configure",
    "kernel",
    "launch",
    "memory_refusal",
    "shipped",
    "ships",
]

#: The floating-point types that kernels take.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: Triton's name of a dtype, in signatures.
TRITON_TYPE = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int64: "i64",
}

#: The type that arithmetic on a dtype is done in.
COMPUTE = {dtype: tl.float64 if dtype is torch.float64 else tl.float32 for dtype in DTYPES}

#: The type that statistics of a dtype, and partial sums, are kept in.
ACCUMULATOR = {dtype: torch.float64 if dtype is torch.float64 else torch.float32 for dtype in DTYPES}

#: Triton's name of the types that kernels' arguments are annotated with.
_ANNOTATED = {tl.int32: "i32", tl.int64: "i64", tl.float64: "fp64"}

#: The most that kernels are told of an integer's divisors, as Triton tells them: more makes no access wider.
ALIGNMENT = 16


@dataclass(frozen=True)
class Configuration:
    """One specialisation of one kernel.

    ``signature`` gives each run-time argument's Triton type in order (``"*fp32"`` for a pointer), ``constants`` the
    values of the ``tl.constexpr`` arguments.  Pointers are aligned to 16 bytes, and the integers named in ``divisible``
    are multiples of 16; Triton compiles slower variants by itself where a caller's are not.  The integers named in
    ``aligned`` are multiples of the constant ``ALIGN``, by default 16; a launch with others has a smaller one, their
    greatest common divisor with 16, and not less than ``least_aligned``: see `variants`.  ``wide_loads`` and
    ``wide_stores`` are the 128-bit accesses that one thread must be seen to make on contiguous data; ``tensor_cores``
    says that the SASS must use them, ``asserts`` that the kernel checks its operands with `numerics.require`,
    ``keeps_subnormals`` that elementary functions don't flush them to 0; ``large`` ones are for devices that take large
    tiles, ``rare`` ones are left to the compile check's thorough run.  AMD's GPUs have ``amd_stages``, where given:
    their multiprocessors have a third of the shared memory.
    """

    label: str
    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    threads: int
    num_stages: int = 2
    amd_stages: int | None = None
    divisible: tuple[str, ...] = ()
    aligned: tuple[str, ...] = ()
    least_aligned: int = 1
    wide_loads: int = 0
    wide_stores: int = 0
    tensor_cores: bool = False
    asserts: bool = False
    keeps_subnormals: bool = False
    large: bool = False
    rare: bool = field(default=False, compare=False)

    def options(self, device: Device) -> dict[str, Any]:
        """What the compiler is told beside the constants."""
        fewer = device.is_amd and self.amd_stages is not None
        stages = self.amd_stages if fewer else self.num_stages
        # Triton compiles assertions in its debug mode alone, which by itself would also check every integer sum.
        checks = {"debug": True, "sanitize_overflow": False} if self.asserts else {}
        # Triton has NVIDIA's device library flush subnormals, which PyTorch's kernels don't; AMD's has no such option.
        subnormals = {"enable_reflect_ftz": False} if self.keeps_subnormals and not device.is_amd else {}
        return {"num_warps": self.num_warps(device.warp_size), "num_stages": stages, **checks, **subnormals}

    def num_warps(self, warp_size: int) -> int:
        return max(1, self.threads // warp_size)

    @cached_property
    def launcher(self) -> Callable[..., None]:
        """A function of (programs, *run-time arguments) that launches."""
        return remembering(self) if REMEMBERS else partial(_launch, self)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The run-time arguments."""
        return tuple(name for name, _ in self.signature)

    def keywords_for(self, arguments: Sequence[Any]) -> dict[str, Any]:
        """What a launch with these run-time arguments is given."""
        keywords = {**dict(self.constants), **self.options(device_of(arguments[0]))}
        if self.aligned:
            extents = (arguments[self.names.index(name)] for name in self.aligned)
            keywords["ALIGN"] = gcd(keywords["ALIGN"], *extents)
        return keywords

    @property
    def variants(self) -> Iterator[Configuration]:
        """What launches whose extents are less aligned take in its place."""
        alignment = dict(self.constants).get("ALIGN", 1)
        while alignment > self.least_aligned:
            alignment //= 2
            constants = {**dict(self.constants), "ALIGN": alignment}
            label = f"{self.label} aligned to {alignment}"
            yield replace(self, label=label, constants=tuple(constants.items()), wide_loads=0, wide_stores=0, rare=True)


def kernel(function: Callable[..., Any], *, unaligned: Iterable[str] = ()) -> Any:
    """A Triton kernel.  Triton compiles it anew where an integer is 1 or a multiple of 16, or a pointer aligned to 16
    bytes, and gains by it: not for integers of an annotated type, and ``unaligned`` pointers, which are what they are
    at run time; nor for any integer where the kernel has a constant ``ALIGN``, which tells more of them.
    """
    fixed = [name for name, annotation in function.__annotations__.items() if annotation in (tl.int32, tl.int64)]
    if "ALIGN" in inspect.signature(function).parameters:
        fixed += _untyped_integers(function)
    return triton.jit(do_not_specialize=[*unaligned, *fixed])(function)


def _untyped_integers(function: Callable[..., Any]) -> list[str]:
    """A kernel's arguments whose type isn't annotated, but for pointers."""
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.annotation is inspect.Parameter.empty and not parameter.name.endswith("_pointer")
    ]


def configure(
    kernel: Any,
    label: str,
    dtype: torch.dtype,
    constants: Mapping[str, Any],
    *,
    pointers: Mapping[str, torch.dtype] | None = None,
    divisible: Iterable[str] | None = None,
    aligned: Iterable[str] = (),
    **promises: Any,
) -> Configuration:
    """The configuration of ``kernel`` for ``dtype``, with the signature that the kernel itself describes.

    Arguments without an annotation are pointers, where their name ends in ``_pointer``, to elements of ``dtype`` or of
    what ``pointers`` has for the rest of the name; or else integers that Triton specialises, and ``divisible``, unless
    these are given, or some are ``aligned``.  What ``constants`` names is no run-time argument: a pointer that is None
    there is missing.  ``promises`` are further fields of `Configuration`.
    """
    aligned = tuple(aligned)
    if aligned:
        constants, divisible = {"ALIGN": ALIGNMENT, **constants}, ()
    elif divisible is None:
        divisible = (name for name in _untyped_integers(kernel.fn) if name not in constants)
    elements = {f"{name}_pointer": element for name, element in (pointers or {}).items()}
    signature = {}
    for parameter in inspect.signature(kernel.fn).parameters.values():
        name = parameter.name
        if name in constants:
            continue
        if name.endswith("_pointer"):
            signature[name] = "*" + TRITON_TYPE[elements.get(name, dtype)]
        elif parameter.annotation in _ANNOTATED:
            signature[name] = _ANNOTATED[parameter.annotation]
        else:
            signature[name] = "i32"
    return Configuration(
        label,
        kernel,
        tuple(signature.items()),
        tuple(constants.items()),
        divisible=tuple(divisible),
        aligned=aligned,
        **promises,
    )


_FAMILIES: defaultdict[str, list[Callable[[], Iterable[Configuration]]]] = defaultdict(list)


def ships(
    family: str,
) -> Callable[[Callable[[], Iterable[Configuration]]], Callable[[], Iterable[Configuration]]]:
    """Register the function that lists every configuration a module of a family can launch."""

    def register(configurations: Callable[[], Iterable[Configuration]]) -> Callable[[], Iterable[Configuration]]:
        _FAMILIES[family].append(configurations)
        return configurations

    return register


def shipped(family: str | None = None, *, variants: bool = False) -> Iterator[Configuration]:
    """All registered configurations, or those of one family; with ``variants``, each is followed by its own."""
    for name, modules in _FAMILIES.items():
        if family is None or family == name:
            for configurations in modules:
                for configuration in configurations():
                    yield configuration
                    if variants:
                        yield from configuration.variants


class DeviceAssertionError(RuntimeError):
    """An operand failed a kernel's check, on the CPU.  A GPU reports it asynchronously, as CUDA errors are."""


def launch(configuration: Configuration, programs: int, *arguments: Any) -> None:
    """Run ``programs`` programs on the device of the first argument.  No programs, no launch.

    ``arguments`` are the run-time arguments, in the order of the configuration's signature.  Raises
    `DeviceAssertionError` on the CPU where an operand fails the kernel's checks.
    """
    if not programs:
        return
    if recorder is None:
        configuration.launcher(programs, *arguments)
    else:
        recorder(configuration, programs, arguments)


#: Launches in place of a configuration, while an operator is recorded.
recorder: Callable[[Configuration, int, tuple[Any, ...]], None] | None = None


def _launch(configuration: Configuration, programs: int, *arguments: Any) -> Any:
    """Launch as Triton does, which returns the kernel that it compiled for arguments like these."""
    tensor = arguments[0]
    elsewhere = tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()
    with torch.cuda.device(tensor.device) if elsewhere else nullcontext():
        try:
            return configuration.kernel[(programs,)](
                **dict(zip(configuration.names, arguments, strict=True)), **configuration.keywords_for(arguments)
            )
        except Exception as error:
            checked = ON_CPU and configuration.asserts
            if checked and isinstance(cause := _root_cause(error), AssertionError):
                raise DeviceAssertionError(str(cause)) from None
            if not INTERPRETING and _is_of_device(error):
                raise refuse(tensor.get_device(), configuration.label, error) from error
            raise


#: What errors of the driver and of Triton say that are no kernel's fault, but their device's or their host's.
_LACKS = ("too many resources", "out of memory", "no kernel image", "C compiler")


def _is_of_device(error: Exception) -> bool:
    """Whether a kernel couldn't be compiled or launched here, of which nothing ran."""
    if isinstance(error, triton.errors.TritonError | subprocess.CalledProcessError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LACKS)


#: Whether launches are remembered.  Drivers whose device is the CPU want tensors, not addresses; AMD's compiler looks
#: at the size of a tensor's memory besides.
REMEMBERS = not ON_CPU and torch.version.hip is None

#: The most launches that one configuration remembers: about as many as its specialised integers have values.
_MOST_REMEMBERED = 4096

_LAUNCHER = """
def launcher(_programs, {names}):
    _device = {first}.get_device()
    if _device != _current_device() or _settings or _modes or _entering.calls or _leaving.calls or _before:
        _launch(_programs, {names})
        return
    {addresses}
    _key = (_device, {key})
    _found = _remembered.get(_key)
    if _found is None:
        _remember(_key, _launch(_programs, {names}))
    else:
        _run, _function, _metadata = _found
        _run(_programs, 1, 1, _stream(_device), _function, _metadata, None, None, None, {arguments})
"""


def remembering(configuration: Configuration) -> Callable[..., None]:
    """`Configuration.launcher` that spares Triton from asking what it knows already, which takes it ten times as long.

    Triton's choice of a compiled kernel depends on the device, on which pointers are aligned to 16 bytes, and on
    integers that it specialises.  Launches that agree in these get what the first of them was given, in the call with
    which Triton itself ends.  Where Triton has hooks, or was told something that it asks for in each launch, it is left
    to it.  The code is written for each configuration, as Triton writes its own: a loop would double the time.
    """
    signature = dict(configuration.signature)
    pointers = [name for name, kind in signature.items() if kind[0] == "*"]
    # Triton looks at the values of all integers but those whose type is declared and which aren't to be specialised.
    fixed = {each.name for each in configuration.kernel.params if each.do_not_specialize and each.annotation_type}
    integers = [name for name, kind in signature.items() if kind[0] in "iu" and name not in fixed]
    source = _LAUNCHER.format(
        names=", ".join(signature),
        first=configuration.names[0],
        addresses="; ".join(f"_{name} = {name}.data_ptr()" for name in pointers),
        key=", ".join([*integers, *(f"_{name} & 15 == 0" for name in pointers)]),
        arguments=", ".join(
            f"_{each.name}" if each.name in pointers else each.name for each in configuration.kernel.params
        ),
    )
    remembered: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}

    def remember(key: tuple[Any, ...], compiled: Any) -> None:
        if len(remembered) >= _MOST_REMEMBERED:
            remembered.clear()
        remembered[key] = compiled.run, compiled.function, compiled.packed_metadata

    runtime = triton.knobs.runtime
    scope: dict[str, Any] = {
        **dict(configuration.constants),
        "_launch": partial(_launch, configuration),
        "_remembered": remembered,
        "_remember": remember,
        "_current_device": torch._C._cuda_getDevice,
        "_stream": torch._C._cuda_getCurrentRawStream,
        "_settings": vars(runtime),  # what the program has set, hooks included
        "_modes": vars(triton.knobs.compilation),
        "_entering": type(runtime).launch_enter_hook,
        "_leaving": type(runtime).launch_exit_hook,
        "_before": configuration.kernel.pre_run_hooks,
    }
    exec(source, scope)
    launcher: Callable[..., None] = scope["launcher"]
    return launcher


def memory_refusal(tensor: torch.Tensor) -> str | None:
    """Why no kernel works on the memory of a plain tensor, by its device, layout and dtype, or None."""
    if tensor.is_cpu:
        if not ON_CPU:
            return "CPU tensor"
    elif not tensor.is_cuda:
        return f"no kernels for {tensor.device.type} tensors"
    refusal: str | None = device_refusal(tensor.get_device())
    if refusal is not None:
        return refusal
    if tensor.layout is not torch.strided:
        return f"{tensor.layout} tensor"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.dtype not in DTYPES:
        return f"no kernel for {tensor.dtype}"
    return None


def _root_cause(error: BaseException) -> BaseException:
    """The interpreter wraps an exception once for every device function that it leaves."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
