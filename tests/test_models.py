"""Models that no one here wrote: torchvision's, and those of Hugging Face's transformers, with random weights."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.device import KERNELS_RUN
from support.torchvision import mend_torchvision
from torch import Tensor, nn

import fusednn

ROOT = Path(__file__).parents[1]


class Network(NamedTuple):
    """A model by the package that has it, the size of its images, and how many layers of how many are replaced.

    ``fused`` is the number of chains.
    """

    package: str
    build: Callable[[Any], nn.Module]
    size: int
    replaced: str
    fused: int


def hugging_face(name: str, **options: Any) -> Callable[[Any], nn.Module]:
    def build(transformers: Any) -> nn.Module:
        config = getattr(transformers, f"{name}Config")(num_labels=3, **options)
        return getattr(transformers, f"{name}ForImageClassification")(config)

    return build


NETWORKS = {
    "ResNet, basic": Network(
        "transformers",
        hugging_face("ResNet", embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"),
        *(16, "18 of 24", 6),
    ),
    "ResNet, bottleneck": Network(
        "transformers",
        hugging_face("ResNet", embedding_size=4, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck"),
        *(16, "26 of 31", 9),
    ),
    "MobileNetV1": Network(
        "transformers", hugging_face("MobileNetV1", depth_multiplier=0.25, min_depth=4), *(32, "82 of 84", 0)
    ),
    "MobileNetV2": Network(
        "transformers",
        hugging_face("MobileNetV2", depth_multiplier=0.25, min_depth=4, depth_divisible_by=4),
        *(32, "140 of 142", 0),
    ),
    "ConvNext": Network(
        "transformers", hugging_face("ConvNext", hidden_sizes=[4, 8], depths=[1, 1], num_stages=2), *(16, "10 of 19", 4)
    ),
    "AlexNet": Network("torchvision", lambda models: models.AlexNet(3), 64, "19 of 21", 7),
    "VGG": Network("torchvision", lambda models: models.vgg11_bn(num_classes=3), 32, "35 of 37", 10),
    "ResNet18": Network("torchvision", lambda models: models.resnet18(num_classes=3), 32, "50 of 52", 20),
    "ResNet, Bottleneck": Network(
        "torchvision", lambda models: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], 3), 32, "40 of 42", 17
    ),
    "SqueezeNet": Network("torchvision", lambda models: models.squeezenet1_1(num_classes=3), 32, "57 of 57", 26),
    "GoogLeNet": Network(
        "torchvision", lambda models: models.googlenet(num_classes=3, init_weights=False), 64, "136 of 140", 61
    ),
}
QUICK = ("ResNet, basic",)
#: Those whose many layers take minutes in Triton's interpreter.
LARGE = ("AlexNet", "GoogLeNet", "MobileNetV1", "MobileNetV2", "ResNet18", "VGG")


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.thorough] * (name not in QUICK)) for name in NETWORKS])
def network(request: pytest.FixtureRequest, device: str) -> Network:
    if request.param in LARGE and KERNELS_RUN and device == "cpu":
        pytest.skip("takes minutes in the interpreter")
    return NETWORKS[request.param]


def instantiate(network: Network, device: str, seed: int) -> nn.Module:
    mend_torchvision()
    package = pytest.importorskip(network.package)
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = network.build(package.models if network.package == "torchvision" else package)
        narrow(model)
    model.to_empty(device=device).to(torch.float64)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5 / parameter[0].numel() ** 0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # masks are drawn differently
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_parameters()
            nn.init.normal_(module.running_mean, std=0.1)
    return model


def narrow(model: nn.Module) -> None:
    """Give the classifiers of AlexNet and VGG 16 hidden units instead of 4096, which take all the time."""
    for module in model.modules():
        linears = [name for name, layer in module.named_children() if getattr(layer, "out_features", 0) == 4096]
        for name in linears:
            inputs = module.get_submodule(name).in_features
            setattr(module, name, nn.Linear(16 if inputs == 4096 else inputs, 16))
        if linears:
            setattr(module, "6", nn.Linear(16, 3))


def outcome(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """All outputs, gradients and buffers of a call."""
    output = model(images)
    outputs = [one for one in (output if isinstance(output, tuple) else (output,)) if one is not None]
    outputs = [getattr(one, "logits", one) for one in outputs]
    model.zero_grad()
    sum(one.square().sum() for one in outputs).backward()
    found = {f"output {index}": one.detach() for index, one in enumerate(outputs)}
    found |= {f"gradient of {name}": one.grad for name, one in model.named_parameters() if one.grad is not None}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(model: nn.Module, stock: nn.Module, images: Tensor) -> None:
    for training in (True, False):
        mine, theirs = (outcome(one.train(training), images) for one in (model, stock))
        assert mine.keys() == theirs.keys()
        for name, expected in theirs.items():
            scale = expected.abs().max().item() if expected.numel() else 0.0
            torch.testing.assert_close(mine[name], expected, rtol=1e-7, atol=1e-7 * scale + 1e-10, msg=name)


@pytest.mark.parametrize("fuse", [False, True])
def test_replaced_as_a_whole(network: Network, fuse: bool, device: str) -> None:
    stock = instantiate(network, device, seed=0)
    model = copy.deepcopy(stock)
    images = torch.rand(2, 3, network.size, network.size, dtype=torch.float64).to(device)
    keys = list(model.state_dict())
    report = fusednn.replace_layers(model, fuse=fuse)
    if fuse:
        assert f"{network.replaced} layers replaced" in str(report)
        assert sum(row.reason.startswith("fused with") for row in report.rows) == network.fused
    else:
        assert all(row.replaced or row.reason == "no fusednn twin" for row in report.rows)
    assert_same(model, stock, images)

    other = instantiate(network, device, seed=1)
    assert list(model.state_dict()) == list(other.state_dict()) == keys
    model.load_state_dict(other.state_dict())
    expected = outcome(other.eval(), images)["output 0"]
    torch.testing.assert_close(outcome(model.eval(), images)["output 0"], expected)
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(outcome(stock.eval(), images)["output 0"], expected)

    fusednn.restore_layers(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]


@pytest.mark.thorough
def test_the_table_of_fused_networks() -> None:
    mend_torchvision()
    pytest.importorskip("torchvision")
    spec = importlib.util.spec_from_file_location("fusing_table", ROOT / "docs" / "fusing_table.py")
    fusing_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fusing_table)
    rows = [fusing_table.row(network) for network in fusing_table.NETWORKS]
    assert sum(row.fused for row in rows) >= 0.95 * sum(row.fusable for row in rows)
    page = fusing_table.PAGE.read_text()
    assert fusing_table.updated(page, rows) == page, "run: PYTHONPATH=.build/models python docs/fusing_table.py"
