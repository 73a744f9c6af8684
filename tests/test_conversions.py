"""Tools that convert, freeze, fold or quantise layers: what a layer does beside its ``torch.nn`` class is never lost.

Those that aren't installed are re-enacted by what they do, in a few lines: timm, detectron2, opacus and mmcv walk over
the children of a model, and put another layer in the place of each that is of a class of ``torch.nn``.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import optimization
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import convert_conv2d_weight_memory_format, fusion, parametrizations, prune

import fusednn
from fusednn import layers

Convert = Callable[[nn.Module], nn.Module]
SHAPE = (3, 4, 6, 6)

#: Each layer that does more than a torch.nn layer, behind a convolution or before a batch norm, for tools that fold.
MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "BatchNormAct2d": lambda: nn.Sequential(nn.Conv2d(4, 5, 3), layers.BatchNormAct2d(5, activation="tanh")),
    "SyncBatchNormAct": lambda: nn.Sequential(nn.Conv2d(4, 5, 3), layers.SyncBatchNormAct(5, activation="tanh")),
    "BatchNormAct1d": lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 5), layers.BatchNormAct1d(5)),
    "ConvAct2d": lambda: nn.Sequential(layers.ConvAct2d(4, 5, 3, activation="gelu"), nn.BatchNorm2d(5)),
    "ConvMaxPool2d": lambda: nn.Sequential(layers.ConvMaxPool2d(4, 5, 3), nn.BatchNorm2d(5)),
    "ConvBatchNormAct2d": lambda: nn.Sequential(layers.ConvBatchNormAct2d(4, 5, 3, pool_size=2), nn.BatchNorm2d(5)),
    "DropConnect": lambda: nn.Sequential(nn.Flatten(), layers.DropConnect(144, 5), nn.BatchNorm1d(5)),
    "replaced": lambda: replaced(fuse=False),
    "fused": lambda: replaced(fuse=True),
}


def replaced(fuse: bool) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2))
    fusednn.replace_layers(model, fuse=fuse)
    return model


def trained(name: str) -> nn.Sequential:
    """A model with statistics and weights that are not the first ones."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias)
    for _ in range(2):
        model(torch.randn(SHAPE))
    return model.eval()


class Frozen(nn.Module):
    """A batch norm with constants, as detection libraries have it."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        self.register_buffer("scale", scale.detach())
        self.register_buffer("shift", (norm.bias - norm.running_mean * scale).detach())

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.dim() - 2))
        return x * self.scale.view(shape) + self.shift.view(shape)


def walk(convert: Callable[[_BatchNorm], nn.Module]) -> Convert:
    """Another layer in the place of each batch norm."""

    def converted(module: nn.Module) -> nn.Module:
        if isinstance(module, _BatchNorm):
            return convert(module)
        for name, child in module.named_children():
            setattr(module, name, converted(child))
        return module

    return converted


def fold(module: nn.Module) -> nn.Module:
    """Each batch norm folded into the convolution or linear layer that comes before it among the children."""
    last: tuple[str, nn.Module] | None = None
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and last is not None:
            function = fusion.fuse_linear_bn_eval if isinstance(last[1], nn.Linear) else fusion.fuse_conv_bn_eval
            setattr(module, last[0], function(last[1], child))
            setattr(module, name, nn.Identity())
        elif not isinstance(child, nn.Conv2d | nn.Linear):
            fold(child)
        last = (name, child) if isinstance(child, nn.Conv2d | nn.Linear) else None
    return module


def quantization_stubs(model: nn.Module) -> nn.Module:
    """Eager-mode quantization's first steps, with a configuration that rounds nothing."""
    model.qconfig = torch.ao.quantization.QConfig(nn.Identity, nn.Identity)
    return torch.ao.quantization.prepare(model)


CONVERSIONS: dict[str, Convert] = {
    "SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "our SyncBatchNorm": layers.SyncBatchNorm.convert_sync_batchnorm,
    "frozen": walk(Frozen),
    "folded": fold,
    "fold_batch_norm": lambda model: layers.fold_batch_norm(model) and model,
    "fx": optimization.fuse,
    "memory format": lambda model: convert_conv2d_weight_memory_format(model, torch.channels_last),
    "quantization": quantization_stubs,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("name", MODELS)
def test_the_values_stay(name: str, conversion: str) -> None:
    model, x = trained(name), torch.randn(SHAPE)
    expected = model(x)
    converted = CONVERSIONS[conversion](copy.deepcopy(model))
    torch.testing.assert_close(converted(x), expected, rtol=1e-4, atol=1e-4)
    if fusednn.restore_layers(converted).rows:
        torch.testing.assert_close(converted(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["BatchNormAct2d", "ConvBatchNormAct2d"])
def test_another_norm_takes_the_batch_norms_place(name: str) -> None:
    """As opacus has it, which can't train batch norms; and the values are those of the parts, one after another."""
    model = walk(lambda norm: nn.GroupNorm(1, norm.num_features))(trained(name))
    assert not any(isinstance(module, _BatchNorm) for module in model[:2].modules() if module is not model[1])
    x, layer = torch.randn(SHAPE), model[1] if name == "BatchNormAct2d" else model[0]
    before = model[0](x) if name == "BatchNormAct2d" else layer.conv(x)
    y = layer.bn(before)
    expected = y.tanh() if name == "BatchNormAct2d" else F.max_pool2d(y.relu(), 2)
    torch.testing.assert_close(layer(before if name == "BatchNormAct2d" else x), expected)


def test_folding_a_layer_that_does_more_is_refused() -> None:
    conv, linear = nn.Conv2d(4, 5, 3).eval(), nn.Linear(3, 5).eval()
    with pytest.raises(AttributeError, match="BatchNormAct2d has no attribute 'eps': it is no BatchNorm2d"):
        fusion.fuse_conv_bn_eval(conv, layers.BatchNormAct2d(5).eval())
    with pytest.raises(AttributeError, match="BatchNormAct1d has no attribute"):
        fusion.fuse_linear_bn_eval(linear, layers.BatchNormAct1d(5).eval())
    for cls in (layers.ConvAct2d, layers.ConvMaxPool2d):
        with pytest.raises(AttributeError, match=f"{cls.__name__} has no attribute 'weight': it is no Conv2d"):
            fusion.fuse_conv_bn_eval(cls(4, 5, 3).eval(), nn.BatchNorm2d(5).eval())
    for wrong in (["0", "1"], ["0", "1", "2"]):
        model = nn.Sequential(conv, layers.BatchNormAct2d(5), nn.ReLU()).eval()
        with pytest.raises((NotImplementedError, AssertionError), match=r"(?i)fuse"):
            torch.ao.quantization.fuse_modules(model, wrong)


def test_whoever_changes_the_child_is_heard() -> None:
    """Hooks, pruning and normed weights of the layer within; it computes by itself, then the rest."""
    x = torch.randn(SHAPE)
    heard: list[int] = []
    for make in (layers.ConvAct2d, layers.ConvMaxPool2d, layers.ConvBatchNormAct2d):
        for change in (
            lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
            parametrizations.weight_norm,
            lambda conv, heard=heard: conv.register_forward_hook(lambda *_: heard.append(1)),
        ):
            layer = make(4, 5, 3).eval()
            change(layer.conv)
            y = layer.conv(x)
            y = layer.bn(y) if isinstance(layer, layers.ConvBatchNormAct2d) else y
            expected = F.max_pool2d(y.relu(), 2) if isinstance(layer, layers.ConvMaxPool2d) else y.relu()
            calls = len(heard)
            heard.clear()
            torch.testing.assert_close(layer(x), expected)
            assert len(heard) == calls
            heard.clear()


def test_drop_connect_drops_the_weights_of_a_linear_layer_alone() -> None:
    layer = layers.DropConnect(3, 5)
    x = torch.randn(2, 3)
    parametrizations.weight_norm(layer.linear)
    torch.testing.assert_close(layer.eval()(x), layer.linear(x))
    assert not torch.equal(layer.train()(x), layer.linear(x))
    layer.linear = nn.Sequential(layer.linear)
    torch.testing.assert_close(layer.eval()(x), layer.linear(x))
    with pytest.raises(TypeError, match="can't drop the weights of a Sequential"):
        layer.train()(x)


# --- The child's parameters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "stock"),
    [
        (layers.BatchNormAct2d(5), nn.BatchNorm2d(5)),
        (layers.SyncBatchNormAct(5, affine=False), nn.SyncBatchNorm(5, affine=False)),
        (layers.ConvAct2d(4, 5, 3, bias=False), nn.Conv2d(4, 5, 3, bias=False)),
        (layers.DropConnect(4, 5), nn.Linear(4, 5)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_parameters_go_by_their_names(layer: nn.Module, stock: nn.Module) -> None:
    nn.Sequential(layer).load_state_dict(nn.Sequential(stock).state_dict())
    layer.load_state_dict(layer.state_dict())
    for name, value in (*stock._parameters.items(), *stock._buffers.items()):
        torch.testing.assert_close(getattr(layer, name), value)
        with pytest.raises(AttributeError, match=f"has no attribute {name!r}: it is no"):
            setattr(layer, name, value)
    for refused in (lambda: layer.no_such_name, lambda: prune.l1_unstructured(layer, "weight", 0.5)):
        with pytest.raises((AttributeError, KeyError)):
            refused()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict({**stock.state_dict(), "wieght": torch.ones(1)})


def test_options_go_by_their_names() -> None:
    layer = layers.BatchNormAct2d(5, momentum=0.2)
    assert (layer.num_features, layer.momentum, layer.affine, layer.track_running_stats) == (5, 0.2, True, True)
    layer.momentum, layer.eps, layer.activation = 0.3, 1e-3, "tanh"
    assert (layer.bn.momentum, layer.bn.eps, layer.activation) == (0.3, 1e-3, "tanh")
    conv = layers.ConvAct2d(4, 6, 3, padding=1)
    assert (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride) == (4, 6, (3, 3), (1, 1))
    conv.stride = (2, 2)
    assert conv(torch.randn(1, 4, 6, 6)).shape == (1, 6, 3, 3)
    layer.eval()
    assert not layer.bn.training
    layer.bn.train()
    assert not layer.training
