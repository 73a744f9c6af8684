"""Writes the table of docs/fusing.md, from torchvision's networks.

``PYTHONPATH=.build/models:tests python docs/fusing_table.py``; their layers hold no memory, so it takes a minute.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fusednn

PAGE = Path(__file__).resolve().parent / "fusing.md"
BEGIN, END = "<!-- networks: begin (docs/fusing_table.py) -->", "<!-- networks: end -->"
NETWORKS = (
    *("alexnet", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "googlenet"),
    *("inception_v3", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0", "mnasnet1_0"),
    *("efficientnet_b0", "regnet_y_400mf", "convnext_tiny"),
)
#: Kinds of layers that follow each other, and may be computed in one: a letter each.
KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "c": (nn.Conv2d,),
    "n": (nn.BatchNorm2d,),
    "l": (nn.Linear,),
    "a": (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid),
    "p": (nn.MaxPool2d,),
    "d": (nn.Dropout,),
}
CHAINS = re.compile("c(n?s?a?p?|pa)|ns?a?|lad?")
ACTIVATIONS, SUMS = ("relu", "relu_", "silu", "gelu", "hardswish", "sigmoid"), ("add", "iadd", "add_")


class Neighbours(TorchFunctionMode):
    """Finds, while a network runs, the layers that are called with what another has just returned."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.fusable: dict[nn.Module, None] = {}
        self._chains: dict[int, tuple[str, list[nn.Module]]] = {}  # by what the last layer returned
        self._kept: list[Any] = []
        self.depth = 0
        for module in model.modules():
            kind = next((kind for kind, classes in KINDS.items() if isinstance(module, classes)), None)
            if kind is not None:
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave(kind))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "").strip("_")
        if self.depth == 0 and name in (*ACTIVATIONS, *SUMS):
            for operand in [one for one in args if isinstance(one, Tensor)]:
                if self._extend(operand, result, "s" if name in SUMS else "a", []):
                    break
        if self.depth == 0 and name == "mul":
            for operand in args:
                path, chain = self._chains.get(id(operand), ("", []))
                if path == "ca":  # a gate's activation is computed with the product
                    self.fusable.pop(chain[0], None)
        return result

    def _enter(self, *_: Any) -> None:
        self.depth += 1

    def _leave(self, kind: str) -> Callable[..., None]:
        def leave(layer: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
            self.depth -= 1
            self._kept.append(args)
            if not self._extend(args[0], result, kind, [layer]) and kind in "cnl":
                self._chains[id(result)] = (kind, [layer])

        return leave

    def _extend(self, before: Tensor, result: Tensor, kind: str, layers: list[nn.Module]) -> bool:
        self._kept.append(result)  # so that no other tensor gets its identity
        path, earlier = self._chains.get(id(before), ("", []))
        if not path or not CHAINS.fullmatch(path + kind):
            return False
        chain = [*earlier, *layers]
        self._chains[id(result)] = (path + kind, chain)
        self.fusable |= dict.fromkeys(chain if kind != "s" else [])
        return True


class Row(NamedTuple):
    network: str
    fusable: int
    fused: int
    left: dict[str, list[str]]  # reason: names


def build(network: str) -> nn.Module:
    from torchvision import models

    options = {"init_weights": False} if network in ("googlenet", "inception_v3") else {}
    model: nn.Module = getattr(models, network)(**options)
    return model.to("meta")


def row(network: str) -> Row:
    model = build(network)
    neighbours = Neighbours(model)
    side = 299 if network == "inception_v3" else 224
    with neighbours, torch.no_grad():
        model(torch.empty(2, 3, side, side, device="meta"))
    names = {module: name for name, module in model.named_modules()}
    report = fusednn.replace_layers(build(network), fuse=True)
    reasons = {name: one.reason for one in report.rows for name in one.names}
    left: dict[str, list[str]] = {}
    for name in (names[layer] for layer in neighbours.fusable):
        if not reasons[name].startswith("fused"):
            _, _, reason = reasons[name].partition("not fused: ")
            left.setdefault(reason or "its neighbour lies in a module with code of its own", []).append(name)
    unfused = sum(len(some) for some in left.values())
    return Row(network, len(neighbours.fusable), len(neighbours.fusable) - unfused, left)


def table(rows: list[Row]) -> str:
    lines = ["| network | layers that could be fused | fused | the others |", "|---|---|---|---|"]
    for one in rows:
        left = "; ".join(f"{', '.join(f'`{name}`' for name in names)}: {why}" for why, names in one.left.items())
        lines.append(f"| {one.network} | {one.fusable} | {one.fused} | {left or '-'} |")
    total, fused = sum(one.fusable for one in rows), sum(one.fused for one in rows)
    lines.append(f"| all | {total} | {fused} ({fused / total:.1%}) | |")
    return "\n".join(lines)


def updated(page: str, rows: list[Row]) -> str:
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"


def main() -> None:
    from support.torchvision import mend_torchvision

    mend_torchvision()
    PAGE.write_text(updated(PAGE.read_text(), [row(network) for network in NETWORKS]))


if __name__ == "__main__":
    main()
