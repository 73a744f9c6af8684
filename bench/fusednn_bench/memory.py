"""What networks keep between forward and backward: stock, compiled, checkpointed, with fusednn, and made again.

Kept are the bytes of distinct memory that autograd saved, beside parameters, buffers and the input.  Moved are those
of a forward and a backward pass, counted in Triton's interpreter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusednn.benchmark.counting import operators_of_cuda
from fusednn.benchmark.protocol import WrongResultError

from .networks import FirstResult

__all__ = ["NETWORKS", "MemoryCase", "count_memory"]

_BLOCKS = ("BasicBlock", "Bottleneck", "InvertedResidual", "MBConv", "_DenseLayer", "_Transition")


@dataclass(frozen=True)
class MemoryCase:
    """A network in bfloat16, in training, on a batch of ``shape``."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def record(self, contestant: str) -> dict[str, Any]:
        return {
            "family": "network",
            "operation": self.name,
            "contestant": contestant,
            "direction": "training_step",
            "dtype": "bf16",
            "size": "small",
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

    torch.manual_seed(0)
    model = case.build().to(torch.bfloat16).train()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0  # a GPU's attention keeps no probabilities for it, a CPU's does
    x = torch.randn(case.shape).bfloat16()
    records = [
        {**case.record("eager"), **_counts(copy.deepcopy(model), x)[0]},
        {**case.record("compile"), **_compiled(copy.deepcopy(model), x)},
        {**case.record("checkpoint"), **_checkpointed(copy.deepcopy(model), x)},
    ]
    gradients = []
    for again in (False, True):
        ours = copy.deepcopy(model)
        fusednn.replace_layers(ours, fuse=True, recompute=again)
        counts, found = _counts(ours, x)
        records.append({**case.record("fusednn-recompute" if again else "fusednn"), **counts})
        gradients.append(found)
    if not all(map(torch.equal, *gradients)):
        raise WrongResultError(f"{case.name}: gradients have other bits where results are made again")
    return records


def _counts(model: nn.Module, x: Tensor) -> tuple[dict[str, int], list[Tensor]]:
    """What is kept and moved, and the gradients."""
    from fusednn.instruments.saved_tensors import saved_tensors
    from fusednn.instruments.traffic import measure_traffic

    torch.manual_seed(1)
    with operators_of_cuda(), measure_traffic() as traffic:
        with saved_tensors() as census:
            y = model(x)
        kept = census.bytes_beside(x, *model.parameters(), *model.buffers())
        del census
        y.float().square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {"kept_bytes": kept, "bytes": traffic.bytes + traffic.aten_bytes}, gradients


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
    """Of each block its input alone; of a network without blocks, the inputs of pieces of four layers."""
    from fusednn.instruments.saved_tensors import saved_tensors

    inputs: list[Tensor] = []

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            leaves = args[0] if isinstance(args[0], list) else args
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
    with saved_tensors() as census:
        model(x)
    census.tensors += inputs
    return {"kept_bytes": census.bytes_beside(x, *model.parameters(), *model.buffers())}
