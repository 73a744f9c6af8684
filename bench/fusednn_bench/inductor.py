"""What `torch.compile` makes of a training step, for a GPU that isn't there: kernels launched and bytes moved.

A model of fake CPU tensors, for which fusednn is told to take kernels, goes through Dynamo and AOTAutograd.  Then the
devices in the graphs are exchanged for CUDA's, and Inductor lowers, schedules and writes code for a made-up H100.
Nothing is compiled below that, and nothing computed.

A kernel of Inductor's counts with the bytes that its scheduler ascribes to it, a call of a library with its operands
and results, and an operator of fusednn's with those of each launch that its launcher makes: read or written once, what
caches would serve included.  The passes over the joint graph see a CPU, but where they take gradients of convolutions
apart, and convolutions and products are the library's, also under ``max-autotune``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.utils import detect_fake_mode
from torch._inductor import (
    compile_fx,
    cudagraph_utils,
    debug,
    decomposition,
    graph,
    ir,
    scheduler,
    select_algorithm,
    virtualized,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fusednn.autograd.operators import IMPLEMENTATIONS
from fusednn.kernels.base import launch

__all__ = ["MAKERS", "Counts", "Launch", "count_step", "made_up_gpu"]

#: Whose launches there are.
MAKERS = ("inductor", "library", "fusednn")

_H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    gcnArchName="",
    warp_size=32,
    multi_processor_count=132,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
)


class Launch(NamedTuple):
    """A launch, whose it is, and the bytes that it moves."""

    maker: str
    name: str
    bytes: int


@dataclass(frozen=True)
class Counts:
    """The launches of a step, in order: forward, then backward; and why CUDA graphs would leave parts of it out."""

    launches: tuple[Launch, ...]
    refusals: tuple[str, ...] = ()

    def launched(self, maker: str | None = None) -> int:
        return sum(maker in (None, launch.maker) for launch in self.launches)

    def bytes(self, maker: str | None = None) -> int:
        return sum(launch.bytes for launch in self.launches if maker in (None, launch.maker))

    def record(self) -> dict[str, int]:
        """As a result file has them."""
        counts = {"launches": self.launched(), "bytes": self.bytes()}
        for maker in MAKERS:
            counts |= {f"{maker}_launches": self.launched(maker), f"{maker}_bytes": self.bytes(maker)}
        return counts


def count_step(model: nn.Module, inputs: Sequence[Tensor], mode: str = "default") -> Counts:
    """What a step of ``model(*inputs)`` and of its gradients launches, compiled in a mode of `torch.compile`'s.

    The tensors may be meta tensors.
    """
    graphs: list[Counts] = []

    def inner(module: torch.fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        graphs.append(_lowered(module, example_inputs, **options))
        return module.forward

    def backend(module: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        return compile_fx.compile_fx(module, example_inputs, inner_compile=inner)

    torch._dynamo.reset()
    options = torch._inductor.list_mode_options(mode)
    with made_up_gpu(), torch._inductor.config.patch(options), FakeTensorMode():
        fake = _materialised(model)
        operands = [_empty(x, "cpu").requires_grad_(x.requires_grad) for x in inputs]
        torch.compile(fake, backend=backend, fullgraph=True)(*operands)
    return Counts(
        tuple(launch for each in graphs for launch in each.launches),
        tuple(refusal for each in graphs for refusal in each.refusals),
    )


@contextmanager
def made_up_gpu() -> Iterator[None]:
    """Inside, PyTorch's compiler sees an H100 and Triton, and fusednn takes kernels for CPU tensors."""
    torch._C._ensureCUDADeviceGuardSet()
    patches: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "_get_device_properties", lambda _=None: _H100),
        (torch.cuda, "get_device_capability", lambda _=None: (_H100.major, _H100.minor)),
        (torch.cuda, "get_rng_state", torch.get_rng_state),
        (torch.cuda, "set_rng_state", torch.set_rng_state),
        (torch.cuda, "synchronize", lambda _=None: None),
        (torch.cuda, "_is_compiled", lambda: True),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "_initialized", True),
        (torch._C, "_conv_determine_backend_memory_format", _format_of_cudnn),
        (torch._C, "_cuda_cudaCachingAllocator_is_enabled", lambda: True),
        (torch._C, "_cuda_getDevice", lambda: 0),
        (torch._C, "_cuda_getCurrentRawStream", lambda _: 0),
        (torch._C, "_cuda_setDevice", lambda _: None),
        (torch._C, "_cuda_exchangeDevice", lambda _: 0),
        (torch._C, "_cuda_maybeExchangeDevice", lambda _: 0),
        (torch.version, "cuda", "12.8"),
        (torch.utils._triton, "has_triton", lambda: True),
        (torch.utils._triton, "triton_hash_with_backend", lambda: "none"),
        (scheduler, "has_triton", lambda: True),
        (select_algorithm.AlgorithmSelectorCache, "__call__", _of_library),
        # Not the CPU's, whose convolution makes the bias's gradient, too: Inductor sums it up on a GPU.
        (decomposition, "is_gpu", lambda _: True),
        (launch, "ON_CPU", True),
    ]
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.enter_context(torch._inductor.config.patch(compile_threads=1, force_disable_caches=True))
        # Otherwise the backward pass is lowered when it first runs.
        stack.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
        yield


def _format_of_cudnn(x: Tensor, weight: Tensor, _: object) -> torch.memory_format:
    """That in which a convolution works: channels-last where either operand is."""
    formats = map(torch._prims_common.suggest_memory_format, (weight, x))
    return next((each for each in formats if each is not torch.contiguous_format), torch.contiguous_format)


def _of_library(_: object, __: str, choices: Sequence[Any], *___: object, **____: object) -> tuple[Any, Any]:
    """Where ``max-autotune`` would measure which of these products is the quickest: the library's."""
    choice = next(each for each in choices if isinstance(each, select_algorithm.ExternKernelCaller))
    return choice.output_node(), choice


def _empty(tensor: Tensor, device: str) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _materialised(model: nn.Module) -> nn.Module:
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return model._apply(lambda tensor: _empty(tensor, "cpu"))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


# --- Lowering ---------------------------------------------------------------------------------------------------------


def _lowered(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    is_backward: bool = False,
    is_inference: bool = False,
    **_: Any,
) -> Counts:
    """What Inductor's code for a graph would launch on a GPU."""
    mode = detect_fake_mode(example_inputs)
    assert mode is not None
    with virtualized.V.set_fake_mode(mode), mode:
        compile_fx.view_to_reshape(module)
        with torch.no_grad():
            compile_fx.fake_tensor_prop(module, example_inputs)
        moved, inputs = _on_gpu(module), [_moved(value) for value in example_inputs]
        compile_fx.record_original_output_strides(moved)
        compile_fx._recursive_post_grad_passes(moved, is_inference=is_inference)
        lowering = graph.GraphLowering(
            moved,
            example_inputs=inputs,
            shape_env=compile_fx.shape_env_from_inputs(inputs),
            is_backward=is_backward,
            is_inference=is_inference,
        )
        with debug.DebugContext(), virtualized.V.set_graph_handler(lowering), virtualized.V.set_extern_kernel_nodes([]):
            lowering.run(*inputs)
            _report_strides(lowering.graph_outputs)
            lowering.codegen()
            launches = tuple(launch for node in lowering.scheduler.nodes for launch in _launches(node))
            return Counts(launches, tuple(_graph_refusals(lowering)))


def _graph_refusals(lowering: graph.GraphLowering) -> Iterator[str]:
    """In PyTorch's words.  Modes without CUDA graphs are a refusal, too."""
    reasons = [lowering.disable_cudagraphs_reason]
    reasons.append(cudagraph_utils.check_lowering_disable_cudagraph(lowering.device_node_mapping))
    reasons += map(lowering.scheduler.should_partition, lowering.scheduler.nodes)
    return filter(None, reasons)


def _report_strides(outputs: Sequence[Any]) -> None:
    """Tell the backward graph, which comes next, the strides that Inductor gave to what is saved for it."""
    context = torch._guards.TracingContext.try_get()
    if context is not None and context.output_strides is not None:
        for each in outputs:
            tensor = isinstance(each, ir.IRNode) and each.has_tensor_output()
            context.output_strides.append(tuple(map(int, each.get_layout().stride)) if tensor else None)


def _on_gpu(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of a graph, on CUDA's device instead of the CPU."""
    new = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in module.graph.nodes:
        made = new.node_copy(node, values.__getitem__)
        made.args, made.kwargs = (torch.fx.node.map_aggregate(part, _device) for part in (made.args, made.kwargs))
        made.meta = {key: value for key, value in node.meta.items() if key != "tensor_meta"}
        for key in ("val", "example_value"):
            if key in made.meta:
                made.meta[key] = _moved(made.meta[key])
        values[node] = made
    return torch.fx.GraphModule(module, new)


def _device(argument: Any) -> Any:
    return torch.device("cuda", 0) if isinstance(argument, torch.device) else argument


def _moved(value: Any, device: str = "cuda") -> Any:
    if isinstance(value, Tensor):
        return _empty(value, device)
    return type(value)(_moved(item, device) for item in value) if isinstance(value, (tuple, list)) else value


# --- Counting ---------------------------------------------------------------------------------------------------------


def _launches(node: Any) -> Iterator[Launch]:
    """Those of one node of the scheduler."""
    if isinstance(node, (scheduler.SchedulerNode, scheduler.FusedSchedulerNode)):
        origins = {str(origin.target) for part in node.get_nodes() for origin in part.node.get_origins()}
        yield Launch("inductor", " ".join(sorted(origins)), node.get_read_write_buffers_sizes())
    elif isinstance(node, scheduler.ExternKernelSchedulerNode) and not isinstance(node.node, ir.MultiOutput):
        called = getattr(node.node, "fx_node", None) or next(iter(node.node.get_origins()))
        operator = getattr(node.node, "op_overload", None) or called.target
        if operator in IMPLEMENTATIONS:
            yield from _of_operator(operator, called)
        else:
            operands = [operand.meta.get("val") for operand in called.all_input_nodes]
            yield from _turned(operator, node.node.inputs)
            yield Launch("library", str(operator), _nbytes(operands) + _nbytes(called.meta.get("val")))


def _turned(operator: object, operands: Sequence[ir.IRNode]) -> Iterator[Launch]:
    """The copies that a convolution makes of operands in another memory format than its own."""
    count = {torch.ops.aten.convolution.default: 2, torch.ops.aten.convolution_backward.default: 3}.get(operator, 0)
    images = [ir.ir_node_to_tensor(each) for each in operands[:count]]
    if images:
        order = _format_of_cudnn(*images[-2:], None)
        for image in images:
            if not image.is_contiguous(memory_format=order):
                yield Launch("library", "aten.clone.default", 2 * _nbytes(image))


def _of_operator(operator: torch._ops.OpOverload[..., Any], called: torch.fx.Node) -> list[Launch]:
    """What an operator of fusednn launches: kernels, and what it calls of PyTorch's."""
    launches: list[Launch] = []

    def note(configuration: launch.Configuration, programs: int, *arguments: Any) -> None:
        if programs:
            # What is worked on in place is two of the kernel's arguments: read, and written.
            again = sum(_nbytes(each) for each in written if sum(each is argument for argument in arguments) > 1)
            launches.append(Launch("fusednn", configuration.kernel.__name__, _nbytes(arguments) + again))

    # On the CPU: without CUDA, PyTorch's own operators refuse even fake tensors of its device.
    args, kwargs = torch.fx.map_arg((called.args, called.kwargs), lambda node: _moved(node.meta["val"], "cpu"))
    changes = [bool(each.alias_info and each.alias_info.is_write) for each in operator._schema.arguments]
    written = [each for each, changed in zip(args, changes, strict=False) if changed and each is not None]
    with _replaced_launch(note), _Operators(launches):
        IMPLEMENTATIONS[operator](*args, **kwargs)
    return launches


@contextmanager
def _replaced_launch(note: Callable[..., None]) -> Iterator[None]:
    """``note`` in place of `launch.launch`, in every module that imported it."""
    real = launch.launch
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("fusednn.kernels.") and getattr(module, "launch", None) is real:
                stack.enter_context(mock.patch.object(module, "launch", note))
        yield


class _Operators(TorchDispatchMode):
    """Counts the operators of PyTorch that launch a kernel: all but questions, views and allocations."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not (func.is_view or func.namespace == "prim" or "empty" in func.__name__):
            self._launches.append(Launch("fusednn", str(func), _nbytes((args, kwargs)) + _nbytes(result)))
        return result


def _nbytes(value: Any) -> int:
    """Of all tensors in ``value``, each once, and of what it shows of its storage."""
    tensors: dict[int, Tensor] = {}
    torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensors.setdefault(id(tensor), tensor), value)
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors.values())
