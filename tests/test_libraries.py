"""Layers of timm, torchvision and transformers: the twins that replacing gives them, and models built of them.

Where one of the libraries isn't installed its tests are skipped.  Their makers' classes are what results are held
against.
"""

import copy
import inspect
import pickle
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.device import KERNELS_RUN
from support.torchvision import mend_torchvision
from torch import Tensor, nn

import fusednn
from fusednn.autograd.dispatch import observe_choices
from fusednn.instruments.saved_tensors import saved_tensors
from fusednn.layers.replacement import register
from fusednn.layers.twin import OTHER_TWINS
from fusednn.testing import check_against_stock, random_tensor

#: Every class that has a twin, by its qualified name, with options that it is tried with.
ACTIVATIONS: dict[str, list[dict[str, Any]]] = {
    **{
        f"timm.layers.activations.{name}": [{}]
        for name in ("GELU", "GELUTanh", "HardSigmoid", "Mish", "PReLU", "QuickGELU")
    },
    **{
        f"timm.layers.activations.{name}": [{}, {"inplace": True}] for name in ("HardSwish", "Sigmoid", "Swish", "Tanh")
    },
    **{f"timm.layers.activations_me.{name}": [{}] for name in ("MishMe", "SwishMe")},
    **{
        f"transformers.activations.{name}": [{}]
        for name in (
            *("AccurateGELUActivation", "FastGELUActivation", "GELUActivation", "GELUTanh", "MishActivation"),
            *("NewGELUActivation", "QuickGELUActivation", "ReLUSquaredActivation", "SiLUActivation"),
        )
    },
    "transformers.models.bloom.modeling_bloom.BloomGelu": [{}],
}
NORMS: dict[str, list[dict[str, Any]]] = {
    "timm.layers.norm_act.BatchNormAct2d": [
        {"num_features": 6},
        {"num_features": 6, "act_layer": "gelu", "momentum": None},
        {"num_features": 6, "apply_act": False, "affine": False},
        {"num_features": 6, "act_layer": "prelu"},
        {"num_features": 6, "drop_layer": partial(nn.Dropout, 0.0)},
    ],
    "timm.layers.norm_act.FrozenBatchNormAct2d": [
        {"num_features": 6, "act_layer": "silu"},
        {"num_features": 6, "drop_layer": partial(nn.Dropout, 0.0)},
    ],
    "torchvision.ops.misc.FrozenBatchNorm2d": [{"num_features": 6}],
    "transformers.models.detr.modeling_detr.DetrFrozenBatchNorm2d": [{"n": 6}],
}
SCALES: dict[str, list[dict[str, Any]]] = {
    "timm.layers.layer_scale.LayerScale": [{"dim": 4}],
    "timm.layers.layer_scale.LayerScale2d": [{"dim": 6}],
    "transformers.models.dinov2.modeling_dinov2.Dinov2LayerScale": [
        {"config": SimpleNamespace(hidden_size=4, layerscale_value=0.5)}
    ],
    "transformers.models.mimi.modeling_mimi.MimiLayerScale": [
        {"config": SimpleNamespace(hidden_size=4, layer_scale_initial_scale=0.5)}
    ],
}
#: What drops nothing yet, and the attribute with the probability.
DROP_PATHS: dict[str, list[dict[str, Any]]] = {
    "timm.layers.drop.DropPath": [{"drop_prob": 0.0}],
    "torchvision.ops.stochastic_depth.StochasticDepth": [{"p": 0.0, "mode": "row"}, {"p": 0.0, "mode": "batch"}],
    "transformers.models.convnext.modeling_convnext.ConvNextDropPath": [{"drop_prob": 0.0}],
}
LOSSES: list[tuple[str, dict[str, Any], str]] = [
    ("timm.loss.cross_entropy.LabelSmoothingCrossEntropy", {}, "classes"),
    ("timm.loss.cross_entropy.SoftTargetCrossEntropy", {}, "soft"),
    ("timm.loss.binary_cross_entropy.BinaryCrossEntropy", {"sum_classes": True}, "classes"),
    (
        "timm.loss.binary_cross_entropy.BinaryCrossEntropy",
        {"target_threshold": 0.2, "pos_weight": 2.0, "smoothing": 0.3},
        "soft",
    ),
    ("timm.loss.binary_cross_entropy.BinaryCrossEntropy", {"smooth_dense": True, "reduction": "sum"}, "soft"),
]
EVERY = [
    pytest.param(name, options, id=f"{name.rpartition('.')[2]}{index or ''}")
    for name, several in (ACTIVATIONS | NORMS | SCALES | DROP_PATHS).items()
    for index, options in enumerate(several)
]
#: Activations compute the same in both modes.
IN_EACH_MODE = [
    pytest.param(*one.values, training, id=f"{one.id}-{'training' if training else 'evaluation'}")
    for one in EVERY
    if one.values[0] not in DROP_PATHS
    for training in ((True, False) if one.values[0] in NORMS else (True,))
]


def their_class(name: str) -> Any:
    mend_torchvision()
    pytest.importorskip(name.partition(".")[0])
    module, _, cls = name.rpartition(".")
    return getattr(import_module(module), cls)


def build(name: str, options: dict[str, Any], device: str) -> nn.Module:
    """A layer with parameters and statistics unlike those of a new one."""
    layer: nn.Module = their_class(name)(**options)
    for key, tensor in layer.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2) if "var" in key else nn.init.normal_(tensor)
    return layer.to(device)


def of_fresh(layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A call of a copy of the layer, in the input's dtype: statistics start anew, and inputs aren't written over."""
    return lambda x: copy.deepcopy(layer).to(x.dtype)(x * 1)


def test_every_class_with_a_twin_is_tried() -> None:
    """Of names with wildcards, one that they mean."""
    tried = {*ACTIVATIONS, *NORMS, *SCALES, *DROP_PATHS, *(name for name, _, _ in LOSSES)}
    registered = [name for name in register._registered if isinstance(name, str)]
    assert all(any(fnmatchcase(one, name) for one in tried) for name in registered)
    assert all(any(fnmatchcase(one, name) for name in registered) for one in tried)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options", "training"), IN_EACH_MODE)
def test_values_and_gradients(
    name: str, options: dict[str, Any], training: bool, dtype: torch.dtype, device: str
) -> None:
    stock = build(name, options, device).train(training)
    layer = nn.Sequential(copy.deepcopy(stock))
    report = fusednn.replace_layers(layer)
    assert report.rows[0].replaced, report
    x, gradient = (random_tensor((3, 6, 5, 4), dtype, device, seed) for seed in (0, 1))
    if KERNELS_RUN:
        path = [row.path for row in fusednn.explain(copy.deepcopy(layer).to(dtype), x * 1) if row.name == "0"]
        assert path == ["kernel"]
    check_against_stock(of_fresh(layer, dtype), of_fresh(stock, dtype), [x], gradient)


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_copied_pickled_restored(name: str, options: dict[str, Any], device: str) -> None:
    stock = build(name, options, device)
    model = nn.Sequential(copy.deepcopy(stock))
    fusednn.replace_layers(model)
    twin = OTHER_TWINS[type(stock)]
    assert type(model[0]) is twin
    assert repr(model[0]) == repr(stock)
    assert list(model[0].state_dict()) == list(stock.state_dict())
    model[0].load_state_dict(build(name, options, device).state_dict())
    stock.load_state_dict(model[0].state_dict())
    x = random_tensor((3, 6, 5, 4), torch.float32, device)
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(one[0]) is twin
        torch.testing.assert_close(one(x * 1), copy.deepcopy(stock)(x * 1))
        fusednn.restore_layers(one)
        assert type(one[0]) is type(stock)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize(("name", "options"), EVERY)
def test_what_they_raise_and_promote(name: str, options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """Of types that their parameters don't have, of other numbers of dimensions, and of none of these."""
    stock = build(name, options, device)
    model = nn.Sequential(copy.deepcopy(stock))
    fusednn.replace_layers(model)
    for shape in ((2, 6, 3, 3), (2, 6), ()):
        x = (4 * random_tensor(shape, torch.float64, device)).to(dtype)
        outcomes = []
        for one in (model[0], stock):
            try:
                y = copy.deepcopy(one)(x * 1)
                outcomes.append((y.dtype, y.double()))
            except Exception as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0][0] is outcomes[1][0], outcomes
        if isinstance(outcomes[1][1], Tensor):
            # The formulas of some have constants of ten digits.
            close = 1e-12 if outcomes[1][0] is torch.float64 else 1e-6
            torch.testing.assert_close(outcomes[0][1], outcomes[1][1], rtol=close, atol=close)
        else:
            assert outcomes[0][1] == outcomes[1][1]


DROPPING = [
    pytest.param(name, index, id=f"{name.rpartition('.')[2]}{index or ''}")
    for name, several in DROP_PATHS.items()
    for index in range(len(several))
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "index"), DROPPING)
def test_drop_paths(name: str, index: int, dtype: torch.dtype, device: str) -> None:
    """Samples stay, divided by the chance to, or go; so do their gradients.  Nothing happens in evaluation."""
    options = {**DROP_PATHS[name][index], ("p" if "torchvision" in name else "drop_prob"): 0.375}
    stock = build(name, options, device)
    model = nn.Sequential(copy.deepcopy(stock))
    assert fusednn.replace_layers(model).rows[0].replaced
    x = torch.ones(2000, 3, dtype=dtype, device=device, requires_grad=True)
    chosen: list[str] = []
    with observe_choices(lambda choice: chosen.append(choice.path)):
        y = model(x)
    assert chosen == ["kernel"] or not KERNELS_RUN
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1.6))
    torch.testing.assert_close(gradient, y)
    assert (kept == kept[:, :1]).all()
    if options.get("mode") == "batch":
        assert kept.all() or not kept.any()
    else:
        deviation = (0.375 * 0.625 / len(x)) ** 0.5
        assert abs(kept[:, 0].double().mean().item() - 0.625) < 6 * deviation
    assert model.eval()(x) is x


class End(nn.Module):
    """As the end of timm's and transformers' blocks."""

    def __init__(self, scale: nn.Module, drop_path: nn.Module) -> None:
        super().__init__()
        self.linear, self.scale, self.drop_path = nn.Linear(4, 4), scale, drop_path

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.scale(self.linear(x)))


class ConvNeXtEnd(nn.Module):
    """As transformers' ConvNeXt: a parameter, and a permutation between."""

    def __init__(self, drop_path: nn.Module) -> None:
        super().__init__()
        self.linear, self.gamma, self.drop_path = nn.Linear(6, 6), nn.Parameter(torch.randn(6)), drop_path

    def forward(self, x: Tensor) -> Tensor:
        y = self.gamma * self.linear(x.permute(0, 2, 3, 1))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class TorchvisionEnd(ConvNeXtEnd):
    """As torchvision's ConvNeXt: in place."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.gamma.view(-1, 1, 1) * self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.drop_path(y)
        y += x
        return y


def ends() -> list[Any]:
    scale = "timm.layers.layer_scale.LayerScale"
    drops = "timm.layers.drop.DropPath"
    row = "torchvision.ops.stochastic_depth.StochasticDepth"
    theirs = "transformers.models.convnext.modeling_convnext.ConvNextDropPath"
    return [
        pytest.param(lambda: End(their_class(scale)(4), their_class(drops)(0.5)), id="timm"),
        pytest.param(lambda: End(their_class(scale)(4), nn.Identity()), id="timm, nothing dropped"),
        pytest.param(lambda: End(nn.Identity(), their_class(drops)(0.5)), id="timm, nothing scaled"),
        pytest.param(lambda: ConvNeXtEnd(their_class(theirs)(0.5)), id="transformers"),
        pytest.param(lambda: TorchvisionEnd(their_class(row)(0.5, "row")), id="torchvision"),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", ends())
def test_ends_of_blocks(make: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> None:
    """One kernel; in evaluation stock's results, in training those of the samples that are kept, twice as far."""
    stock = make().to(device, dtype)
    for parameter in stock.parameters():
        nn.init.normal_(parameter)
    model = copy.deepcopy(stock)
    report = fusednn.replace_layers(model, fuse=True)
    x, gradient = (random_tensor((6, 6, 4, 4), dtype, device, seed) for seed in range(2))
    if isinstance(stock, TorchvisionEnd):  # what is added to in place decides how the sum lies in memory
        x = x.contiguous(memory_format=torch.channels_last)
    for one in (stock, model):
        one.eval()
    check_against_stock(of_fresh(model, dtype), of_fresh(stock, dtype), [x], gradient)
    model.train()
    chosen: list[str] = []
    with observe_choices(lambda choice: chosen.append(f"{choice.operation} {choice.path}")):
        y = model(x * 1)
    assert chosen == ["block_end kernel"] * KERNELS_RUN or not KERNELS_RUN, report
    branch = stock(x * 1) - x
    kept = ((y - x).reshape(6, -1).abs().amax(1) > 0).view(-1, 1, 1, 1)
    dropping = not isinstance(model.drop_path, nn.Identity)
    tolerance = 0.1 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(y - x, branch * (kept * 2 if dropping else 1), rtol=tolerance, atol=tolerance)


def test_what_changes_in_an_end_is_seen(device: str) -> None:
    """Hooks, other classes and options, and no tensor beside the input."""
    stock = End(their_class("timm.layers.layer_scale.LayerScale")(4), their_class("timm.layers.drop.DropPath")(0.5))
    model = copy.deepcopy(stock.to(device))
    fusednn.replace_layers(model, fuse=True)
    x = random_tensor((3, 4), torch.float32, device)
    heard: list[Tensor] = []

    def hear(_: nn.Module, args: Any, y: Tensor) -> None:
        heard.append(y.detach().clone())

    changes: list[Callable[[Any], Any]] = [
        lambda one: (one.eval(), setattr(one.scale, "inplace", True)),
        lambda one: setattr(one.drop_path, "drop_prob", 0.0),
        lambda one: setattr(one.drop_path, "drop_prob", 1.0),
        lambda one: setattr(one, "drop_path", nn.Tanh()),
        lambda one: (one.eval(), one.scale.register_forward_hook(hear)),
        lambda one: (one.eval(), one.drop_path.register_forward_hook(hear)),
    ]
    for change in changes:
        heard.clear()
        ours, theirs = copy.deepcopy(model), copy.deepcopy(stock)
        for one in (ours, theirs):
            change(one)
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(heard[: len(heard) // 2], heard[len(heard) // 2 :])


class Inverted(nn.Module):
    """As timm's inverted residual: a norm without activation, a path that isn't dropped, a residual."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 1, bias=False), norm(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 1, bias=False), norm(4, apply_act=False)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(x))
        return self.drop_path(x) + shortcut


class Frozen(nn.Module):
    """As torchvision's detectors: a frozen norm, a residual, an activation."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 3, padding=1, bias=False), norm(4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        y += x
        return self.relu(y)


CHAINS: list[tuple[str, Callable[[Any], nn.Module], dict[str, str]]] = [
    (
        "timm.layers.norm_act.BatchNormAct2d",
        Inverted,
        {"conv1": "fused with bn1", "conv2": "fused with bn2, drop_path"},
    ),
    ("timm.layers.norm_act.BatchNormAct2d", lambda norm: nn.Sequential(norm(4)), {}),
    (
        "timm.layers.norm_act.BatchNormAct2d",
        lambda norm: nn.Sequential(nn.Conv2d(4, 4, 1), norm(4, act_layer="silu"), nn.MaxPool2d(2)),
        {"0": "fused with 1, 2"},
    ),
    ("timm.layers.norm_act.FrozenBatchNormAct2d", Inverted, {"conv2": "fused with bn2, drop_path"}),
    ("torchvision.ops.misc.FrozenBatchNorm2d", Frozen, {"conv": "fused with bn, relu"}),
    (
        "torchvision.ops.misc.FrozenBatchNorm2d",
        lambda norm: nn.Sequential(norm(4), nn.Hardtanh()),
        {"0": "fused with 1"},
    ),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "build_block", "fused"), CHAINS)
def test_norms_in_chains(
    name: str, build_block: Callable[[Any], nn.Module], fused: dict[str, str], training: bool, device: str
) -> None:
    stock = build_block(their_class(name)).to(device).train(training)
    for key, tensor in stock.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2) if "var" in key else nn.init.normal_(tensor)
    model = copy.deepcopy(stock)
    reasons = {row.names[0]: row.reason for row in fusednn.replace_layers(model, fuse=True).rows}
    assert {key: reasons[key] for key in fused} == fused
    x = random_tensor((2, 4, 4, 4), torch.float32, device)
    gradient = random_tensor(copy.deepcopy(stock)(x * 1).shape, torch.float32, device, 1)
    check_against_stock(of_fresh(model, x.dtype), of_fresh(stock, x.dtype), [x], gradient)
    model(x), stock(x)
    for (key, ours), theirs in zip(model.state_dict().items(), stock.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=key, rtol=1e-5, atol=1e-5)


def test_what_changes_in_a_norm_of_a_chain_is_seen(device: str) -> None:
    """A layer that drops, an activation that wasn't there, a hook on one that is, another dtype."""
    stock = Inverted(their_class("timm.layers.norm_act.BatchNormAct2d")).to(device)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    heard: list[Tensor] = []

    def hear(_: nn.Module, args: Any, y: Tensor) -> None:
        heard.append(y.detach().clone())

    changes: list[Callable[[Any], Any]] = [
        lambda one: setattr(one.bn1, "drop", nn.Dropout(1.0)),
        lambda one: setattr(one.bn2, "act", nn.Tanh()),
        lambda one: one.bn1.act.register_forward_hook(hear),
        lambda one: one.drop_path.register_forward_hook(hear),
        lambda one: setattr(one.bn1, "training", False),
    ]
    x = random_tensor((2, 4, 4, 4), torch.float32, device)
    for change in changes:
        heard.clear()
        ours, theirs = copy.deepcopy(model), copy.deepcopy(stock)
        for one in (ours, theirs):
            change(one)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(heard[: len(heard) // 2], heard[len(heard) // 2 :], rtol=1e-5, atol=1e-5)


def test_frozen_norms_promote_under_autocast(device: str) -> None:
    stock = Frozen(their_class("torchvision.ops.misc.FrozenBatchNorm2d")).to(device)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    x = random_tensor((2, 4, 4, 4), torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        y, expected = model(x), stock(x)
    assert y.dtype is expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_options_that_have_no_kernel_are_left() -> None:
    cls = their_class("transformers.activations.GELUActivation")
    report = fusednn.replace_layers(nn.Sequential(cls(use_gelu_python=True)))
    assert report.rows[0].reason == "doesn't call torch.nn.functional.gelu"


def test_norm_act_is_heard_apart(device: str) -> None:
    """A hook on its activation hears it."""
    model = nn.Sequential(build("timm.layers.norm_act.BatchNormAct2d", {"num_features": 6}, device))
    fusednn.replace_layers(model)
    heard: list[Tensor] = []
    model[0].act.register_forward_hook(lambda _, args, y: heard.append(y.detach().clone()))
    y = model(random_tensor((3, 6, 5, 4), torch.float32, device))
    torch.testing.assert_close(heard, [y.detach()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options", "targets"), LOSSES)
def test_losses(name: str, options: dict[str, Any], targets: str, dtype: torch.dtype, device: str) -> None:
    stock = their_class(name)(**options).to(device)
    loss = fusednn.replace_layers(nn.Sequential(copy.deepcopy(stock)))
    assert loss.rows[0].replaced, loss
    ours = nn.Sequential(copy.deepcopy(stock))
    fusednn.replace_layers(ours)
    x = random_tensor((7, 5), dtype, device)
    target = torch.arange(7, device=device) % 5
    soft = random_tensor((7, 5), torch.float64, device, 1).softmax(1)

    def of(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: copy.deepcopy(layer).to(x.dtype)(x, target if targets == "classes" else soft.to(x.dtype))

    chosen: list[str] = []
    with observe_choices(lambda choice: chosen.append(choice.path)):
        of(ours[0])(x)
    assert chosen == ["kernel"] or not KERNELS_RUN
    check_against_stock(of(ours[0]), of(stock), [x], random_tensor((), dtype, device, 2))


@pytest.mark.parametrize("bad", [torch.tensor([0, 5]), torch.tensor([0, -100]), torch.tensor([0.0, 1.0])], ids=str)
def test_losses_refuse_what_theirs_refuse(bad: Tensor, device: str) -> None:
    stock = their_class("timm.loss.cross_entropy.LabelSmoothingCrossEntropy")()
    ours = nn.Sequential(copy.deepcopy(stock))
    fusednn.replace_layers(ours)
    for loss in (stock, ours[0]):
        with pytest.raises((IndexError, RuntimeError)):
            loss(torch.zeros(2, 5), bad)


def loss_functions(name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Ours, and transformers'."""
    mend_torchvision()
    theirs = pytest.importorskip("transformers.loss.loss_utils")
    names = {"causal_lm_loss": "ForCausalLMLoss", "masked_lm_loss": "ForMaskedLMLoss"}
    ours = getattr(fusednn.layers.libraries.transformers, name)
    return ours, getattr(theirs, names.get(name, "ForTokenClassification"))


@pytest.mark.parametrize("items", [None, 3, torch.tensor(3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["causal_lm_loss", "masked_lm_loss", "token_classification_loss"])
def test_loss_functions(name: str, dtype: torch.dtype, items: Any, device: str) -> None:
    ours, theirs = loss_functions(name)
    assert {*inspect.signature(ours).parameters} == {*inspect.signature(theirs).parameters}
    labels = torch.tensor([[0, 2, -100, 1], [4, 3, 2, -100]], device=device)
    classes: Any = SimpleNamespace(num_labels=5) if name == "token_classification_loss" else 5
    results = []
    for function in (theirs, ours):
        logits = random_tensor((2, 4, 5), dtype, device).requires_grad_()
        loss = function(logits, labels, classes, num_items_in_batch=items)
        assert loss.dtype is torch.float32
        (gradient,) = torch.autograd.grad(loss, logits)
        results.append((loss, gradient))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1])


@pytest.mark.kernels
@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["causal_lm_loss", "masked_lm_loss", "token_classification_loss"])
def test_what_losses_cost(name: str, device: str) -> None:
    """Bytes of a 16-bit logit: the table of docs/libraries.md."""
    from fusednn.instruments.traffic import measure_traffic

    ours, theirs = loss_functions(name)
    classes: Any = SimpleNamespace(num_labels=1024) if name == "token_classification_loss" else 1024
    logits = random_tensor((1, 4, 1024), torch.bfloat16, device).requires_grad_()
    labels = torch.arange(4, device=device).view(1, 4)

    def costs(function: Callable[..., Tensor]) -> tuple[int, ...]:
        with measure_traffic() as forward, saved_tensors() as saved:
            loss = function(logits, labels, classes)
        with measure_traffic() as backward:
            torch.autograd.grad(loss, logits)
        found = (forward.bytes + forward.aten_bytes, backward.bytes + backward.aten_bytes, saved.bytes)
        return tuple(round(count / logits.numel()) for count in found)

    counted = {"transformers": costs(theirs), "ours": costs(ours)}
    with fusednn.replace_functions():
        counted["transformers, `replace_functions()`"] = costs(theirs)
    page = (Path(__file__).parents[1] / "docs" / "libraries.md").read_text()
    for whose, figures in counted.items():
        assert f"| {whose} | {' | '.join(map(str, figures))} |" in page, counted
