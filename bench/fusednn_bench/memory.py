"""What networks keep between forward and backward: stock, compiled, checkpointed, with fusednn, and made again.

Kept are the bytes of distinct memory that autograd saved, beside parameters, buffers and the input.  Moved are those
of a forward and a backward pass, and the peak is the most that tensors hold in between: of launches that are counted
and not run.  Gradients' bits are compared in Triton's interpreter, with fewer channels on smaller images.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusednn.benchmark.counting import operators_of_cuda
from fusednn.benchmark.protocol import WrongResultError
from fusednn.instruments.census import saved_by_layer

from .networks import FirstResult
from .peak import Peak

__all__ = [
    "DEPTHS",
    "NETWORKS",
    "MemoryCase",
    "checkpointed",
    "count_layers",
    "count_memory",
    "let_go",
    "narrowed",
    "prepared",
]

#: Depths of results that are made of one another, beside the default one.
DEPTHS = (0, 1, 2, 9)

_LAYERS = 6  # that keep the most, in a census

_BLOCKS = ("BasicBlock", "Bottleneck", "InvertedResidual", "MBConv", "_DenseLayer", "_Transition")


@dataclass(frozen=True)
class MemoryCase:
    """A network in bfloat16, in training, on a batch of ``shape``."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    size: str = "small"

    def record(self, contestant: str) -> dict[str, Any]:
        return {
            "family": "network",
            "operation": self.name,
            "contestant": contestant,
            "direction": "training_step",
            "dtype": "bf16",
            "size": self.size,
            "shape": list(self.shape),
        }


def _lenet() -> nn.Module:
    first, second = ([nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)] for a, b in ((3, 32), (32, 64)))
    return nn.Sequential(
        *first, *second, nn.Flatten(), nn.Linear(4096, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 10)
    )


def _mlp() -> nn.Module:
    half = [nn.Linear(256, 1024), nn.GELU(), nn.Dropout(0.1), nn.Linear(1024, 256)]
    return nn.Sequential(*half, nn.LayerNorm(256), *copy.deepcopy(half))


def _torchvision(name: str) -> nn.Module:
    model: nn.Module = getattr(import_module("torchvision.models"), name)(num_classes=10)
    return model.features if name.startswith("vgg") else model  # type: ignore[return-value]


def _encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(256, 4, 1024, activation=nn.GELU(), norm_first=True, batch_first=True)


def _bert() -> nn.Module:
    transformers = import_module("transformers")
    config = transformers.BertConfig(
        hidden_size=256, num_attention_heads=4, intermediate_size=1024, attention_probs_dropout_prob=0.0
    )
    config._attn_implementation = "sdpa"
    return FirstResult(import_module("transformers.models.bert.modeling_bert").BertLayer(config))


def _gpt2() -> nn.Module:
    transformers = import_module("transformers")
    config = transformers.GPT2Config(n_embd=256, n_head=4, attn_pdrop=0.0)
    config._attn_implementation = "sdpa"
    return FirstResult(import_module("transformers.models.gpt2.modeling_gpt2").GPT2Block(config, layer_idx=0))


def _vit() -> nn.Module:
    block: nn.Module = import_module("torchvision.models.vision_transformer").EncoderBlock(4, 256, 1024, 0.0, 0.0)
    return block


_IMAGES = (2, 3, 64, 64)
_TOKENS = (2, 64, 256)

NETWORKS: tuple[MemoryCase, ...] = (
    MemoryCase("LeNet", _lenet, (4, 3, 32, 32)),
    MemoryCase("MLP, GELU and dropout", _mlp, (64, 256)),
    MemoryCase("BERT block", _bert, _TOKENS),
    MemoryCase("GPT-2 block", _gpt2, _TOKENS),
    MemoryCase("ViT block", _vit, _TOKENS),
    MemoryCase("nn.TransformerEncoderLayer", _encoder, _TOKENS),
    MemoryCase("VGG-11", lambda: _torchvision("vgg11"), _IMAGES),
    MemoryCase("VGG-11, batch norm", lambda: _torchvision("vgg11_bn"), _IMAGES),
    MemoryCase("ResNet-18", lambda: _torchvision("resnet18"), _IMAGES),
    MemoryCase("MobileNetV3 small", lambda: _torchvision("mobilenet_v3_small"), _IMAGES),
    MemoryCase("ResNet-50", lambda: _torchvision("resnet50"), _IMAGES),
    MemoryCase("EfficientNet-B0", lambda: _torchvision("efficientnet_b0"), _IMAGES),
    MemoryCase("DenseNet-121", lambda: _torchvision("densenet121"), _IMAGES),
)


def count_memory(case: MemoryCase) -> list[dict[str, Any]]:
    """A record of each contestant.  Raises WrongResultError where making results again changes a bit of a gradient."""
    import fusednn

    model, x = prepared(case)

    def replaced(of: nn.Module = model, **options: Any) -> nn.Module:
        ours = copy.deepcopy(of)
        fusednn.replace_layers(ours, fuse=True, **options)
        return ours

    small = (model, x) if x.dim() < 4 else (narrowed(copy.deepcopy(model)), x[..., :_SIDE, :_SIDE])
    _check_bits([replaced(small[0], recompute=again) for again in (False, True)], small[1])
    return [
        {**case.record("eager"), **_counts(copy.deepcopy(model), x)},
        {**case.record("compile"), **_compiled(copy.deepcopy(model), x)},
        {**case.record("checkpoint"), **_checkpointed(copy.deepcopy(model), x)},
        {**case.record("fusednn"), **_counts(replaced(), x)},
        {**case.record("fusednn-recompute"), **_counts(replaced(recompute=True), x)},
        *(
            {**case.record(f"depth {depth}"), **_counts(replaced(recompute=True, recompute_depth=depth), x)}
            for depth in DEPTHS
        ),
    ]


def prepared(case: MemoryCase) -> tuple[nn.Module, Tensor]:
    """The network and its input."""
    torch.manual_seed(0)
    model = case.build().to(torch.bfloat16).train()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0  # a GPU's attention keeps no probabilities for it, a CPU's does
    return model, torch.randn(case.shape).bfloat16()


def count_layers(case: MemoryCase) -> dict[str, Any]:
    """A record of the layers that still keep the most where results are made again: name, class, maker and bytes."""
    import fusednn

    model, x = prepared(case)
    fusednn.replace_layers(model, fuse=True, recompute=True)
    census = fusednn.census(model, x)
    largest = [[row.name, row.layer, row.maker, row.bytes] for row in census.rows[:_LAYERS]]
    return {**case.record("fusednn-recompute"), "kept_bytes": census.bytes, "kept_bytes_by_layer": largest}


#: Of images on which bits are compared: of the last feature maps of VGG-11 one pixel is left.
_SIDE = 32


def narrowed(model: nn.Module) -> nn.Module:
    """An eighth of the channels, but of the input's: the layers are as many, and the interpreter's programs fewer."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.groups = _eighth(layer.groups)
            layer.in_channels, layer.out_channels = _eighth(layer.in_channels), _eighth(layer.out_channels)
            _shorten(layer, layer.out_channels, layer.in_channels // layer.groups)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.num_features = _eighth(layer.num_features)
            _shorten(layer, layer.num_features)
        elif isinstance(layer, nn.Linear):
            layer.in_features, layer.out_features = _eighth(layer.in_features), _eighth(layer.out_features)
            _shorten(layer, layer.out_features, layer.in_features)
    return model


def _eighth(channels: int) -> int:
    return channels if channels <= 3 else max(1, channels // 8)


def _shorten(layer: nn.Module, first: int, second: int | None = None) -> None:
    """Tensors of a layer to so many of their first dimension, and of a weight's second."""
    for tensors in (layer._parameters, layer._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and tensor.dim() > 0:
                part = tensor.detach()[:first] if tensor.dim() == 1 else tensor.detach()[:first, :second]
                tensors[name] = nn.Parameter(part.clone()) if isinstance(tensor, nn.Parameter) else part.clone()


def _check_bits(models: Sequence[nn.Module], x: Tensor) -> None:
    """Whether the gradients of all parameters are the same bits, of copies of one model."""
    found = []
    for model in models:
        torch.manual_seed(1)
        model(x).float().square().mean().backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    if not found[0] or not all(all(map(torch.equal, found[0], other)) for other in found[1:]):
        raise WrongResultError("gradients have other bits where results are made again")


def _counts(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """What is kept and moved, and the peak.  Kernels aren't run: the model is of no use afterwards."""
    from fusednn.instruments.launches import count_launches

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(let_go)
    held = (x, *model.parameters(), *model.buffers())
    with operators_of_cuda(), count_launches() as traffic, Peak(held) as peak:
        with saved_by_layer(model, [x]) as rows:
            y = model(x)
        y.float().square().mean().backward()
    makers = Counter[str]()
    for row in rows:
        makers[row.maker] += row.bytes
    return {
        "kept_bytes": makers.total(),
        "kept_bytes_by_maker": dict(makers.most_common()),
        "bytes": traffic.bytes + traffic.aten_bytes,
        "peak_bytes": peak.bytes,
    }


def let_go(parameter: Tensor) -> None:
    """Parameters' gradients, as large as these, would hide what is looked for at the peak."""
    parameter.grad = None


def _compiled(model: nn.Module, x: Tensor) -> dict[str, int]:
    """By the compiler's own partition between forward and backward, which no GPU is needed for."""
    from fusednn.instruments.saved_tensors import saved_tensors

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager_decomp_partition")
    with operators_of_cuda():
        compiled(x)
        with saved_tensors() as census:
            compiled(x)
    return {"kept_bytes": census.bytes_beside(x, *model.parameters(), *model.buffers())}


def _checkpointed(model: nn.Module, x: Tensor) -> dict[str, int]:
    from fusednn.instruments.saved_tensors import saved_tensors

    inputs: list[Tensor] = []
    model = checkpointed(model, inputs)
    with saved_tensors() as census:
        model(x)
    census.tensors += inputs
    return {"kept_bytes": census.bytes_beside(x, *model.parameters(), *model.buffers())}


def checkpointed(model: nn.Module, inputs: list[Tensor] | None = None) -> nn.Module:
    """Keeps of each block its input alone; of a network without blocks, the inputs of pieces of four layers.

    They are added to ``inputs``.
    """

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            leaves = args[0] if isinstance(args[0], list) else args
            if inputs is not None:
                inputs.extend(leaf for leaf in leaves if isinstance(leaf, Tensor))
            return checkpoint(forward, *args, use_reentrant=False)

        return run

    blocks = [module for module in model.modules() if type(module).__name__ in _BLOCKS]
    if isinstance(model, nn.Sequential):
        layers = list(model)
        blocks = [nn.Sequential(*layers[i : i + 4]) for i in range(0, len(layers), 4)]
        model = nn.Sequential(*blocks)
    for block in blocks or [model]:
        block.forward = wrapped(block.forward)
    return model
