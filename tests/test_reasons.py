"""Each reason for which a call goes to PyTorch's operators: given where it holds, and not where it doesn't.

Where one is missing the kernels would take what they aren't made for, or the stock operator be asked for nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks

from fusednn import autograd, optim
from fusednn.autograd.batch_norm_chain import batch_norm_chain
from fusednn.autograd.batch_norm_pool import batch_norm_pool
from fusednn.autograd.conv import conv_act_pool
from fusednn.autograd.dispatch import Choice, observe_choices, transform_refusal
from fusednn.autograd.recompute import reason_to_keep
from fusednn.kernels import batch_norm_pool as pool_kernels
from fusednn.kernels import nll_loss as nll_loss_kernels
from fusednn.optim import refusals
from fusednn.testing import random_tensor

pytestmark = [pytest.mark.kernels, pytest.mark.filterwarnings("ignore")]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return random_tensor(shape, torch.float32, "cpu", seed)


X, ONES, IMAGES, FILTERS = normal(4, 5), torch.ones(5), normal(2, 3, 6, 6), normal(4, 3, 3, 3)
CLASSES, NORM = torch.arange(4), {"input": IMAGES, "running_mean": torch.zeros(3), "running_var": torch.ones(3)}
LOSS, NLL = {"input": X, "target": CLASSES}, {"input": X.log_softmax(1), "target": CLASSES}
LINEAR = {**LOSS, "linear_weight": normal(6, 5, seed=1)}
BIASED = {"input": X, "bias": ONES, "residual": X.flip(0)}
CONV = {"input": IMAGES, "weight": FILTERS}
GATE = {"input": IMAGES, "gate": normal(2, 3, 1, 1)}
LABELS = X.softmax(1)

#: Arguments that are exchanged, together, for a reason.
Changed = dict[str, Any]

#: By function, the arguments that all its kernels take, and by reason those that are exchanged for it; where there are
#: several, each alone.
FUNCTIONS: dict[str, tuple[dict[str, Any], dict[str, Changed | tuple[Changed, ...]]]] = {
    "batch_norm_act": (
        {**NORM, "training": True},
        {
            "training is not a boolean": {"training": 1},
            "list is not a plain tensor": ({"weight": [1.0] * 3}, {"running_mean": [0.0] * 3}),
            "momentum is not a Python number": {"momentum": "0.1"},
            "eps is not a positive number": ({"eps": 0.0}, {"eps": "1"}),
            "no dimension of channels": {"input": IMAGES.flatten()},
            "statistics and parameters are not vectors of the channels": tuple(
                {key: torch.ones(4)} for key in ("running_mean", "running_var", "weight", "bias")
            ),
            "running statistics are missing": (
                {"running_mean": None},
                {"running_var": None},
                {"running_mean": None, "running_var": None, "training": False},
            ),
            "running statistics require gradients, or are strided": (
                {"running_mean": torch.zeros(6)[::2]},
                {"running_var": torch.ones(3, requires_grad=True)},
            ),
            "the residual has another shape": {"residual": IMAGES[:1]},
            "one value per channel": {"input": IMAGES[:1, :, :1, :1]},
            "the number of batches is not one int64 beside the input": (
                {"batches": torch.tensor(0.0)},
                {"batches": torch.zeros(2, dtype=torch.int64)},
                {"batches": 3},
            ),
            "no kernel for these parameters' dtypes": {
                "weight": torch.ones(3).double(),
                "running_mean": None,
                "running_var": None,
            },
            "the parameters differ in dtype, device or layout": {
                "input": IMAGES.bfloat16(),
                "bias": torch.ones(3).bfloat16(),
            },
        },
    ),
    "bias_activation_dropout": (
        BIASED,
        {
            "no such dimension": {"dim": 2},
            "the bias is not one number for each channel": {"bias": torch.ones(1)},
            "the residual is of another shape": {"residual": X[:1]},
            "the slopes are neither one nor one per channel": {"slopes": torch.ones(2)},
            "the channels that are dropped don't lie one after another, or last": {"of_channels": True},
            "a parameter is not finite": {"activation": "leaky_relu", "parameters": (float("nan"),)},
            "p is not a probability": ({"p": 1.5}, {"p": -0.5}),
            "training is not a boolean": {"training": 1},
        },
    ),
    "block_end": (
        {"input": X, "residual": X.flip(0), "scale": ONES},
        {
            "p or training is not a Python value": ({"training": 1}, {"p": torch.tensor(0.5)}),
            "nothing but a sum": {"scale": None},
            "no elements, or no samples": {"input": X[:0], "residual": X[:0]},
            "the residual is of another shape": {"residual": X[:1]},
            "the scale is not one number for each element of a dimension behind the first": {"scale": X[:, :1]},
            "samples don't lie one after another": {"input": normal(5, 4).t(), "p": 0.5},
        },
    ),
    "conv_act_pool2d": (
        CONV,
        {
            "a size is not an integer for each direction": tuple(
                {key: (1, 2, 3)} for key in ("stride", "padding", "dilation", "pool_size")
            ),
            "a size of the convolution is not positive": tuple({key: 0} for key in ("stride", "dilation")),
            "not a batch of images and their filters": ({"weight": FILTERS[..., 0]}, {"input": IMAGES[0, 0]}),
            "the filters don't fit the channels": {"weight": FILTERS[:, :2]},
            "the bias is not one for each filter": {"bias": torch.ones(3)},
        },
    ),
    "cross_entropy": (
        LOSS,
        {
            "unknown reduction": {"reduction": "median"},
            "no classes": {"input": X[0, 0]},
            "ignore_index is not an int": {"ignore_index": 1.0},
            "label_smoothing is not a number from 0 to 1": tuple({"label_smoothing": one} for one in (2.0, -0.5, "a")),
            "the target is not a plain tensor on the input's device": {"target": CLASSES.to("meta")},
            "probabilities of another dtype, or with an ignore_index": {"target": LABELS.double()},
            "the target holds neither int64 indices nor probabilities of the input's shape": {"target": CLASSES.int()},
            "the weights are not a plain tensor on the input's device": {"weight": ONES.to("meta")},
            "the weights are of another dtype": {"weight": ONES.double()},
            "the weights are not one for each class": {"weight": ONES[:4]},
            "the weights require gradients": {"weight": ONES.clone().requires_grad_()},
        },
    ),
    "gated": (
        {"gate": X, "other": X.flip(0)},
        {
            "no kernel gates with tanh": {"activation": "tanh"},
            "the gate is what it gates": {"other": X},
            "gate and operand differ in shape": {"other": X[:1]},
            "memory that isn't walked alike": {"other": normal(5, 4).t()},
        },
    ),
    "gated_channels": (
        GATE,
        {
            "no kernel gates channels with tanh": {"activation": "tanh"},
            "the gate hasn't one element for each sample's channel": tuple(
                {"gate": normal(*shape)} for shape in ((2, 3, 1, 6), (1, 3, 1, 1), (2, 1, 1, 1))
            ),
            "neither contiguous nor channels last": {"input": IMAGES.transpose(2, 3)},
            "no elements": (
                {"input": IMAGES[:0], "gate": GATE["gate"][:0]},
                {"input": IMAGES[:, :0], "gate": GATE["gate"][:, :0]},
                {"input": IMAGES[..., :0]},
            ),
        },
    ),
    "gated_halves": (
        {"input": normal(4, 6)},
        {
            "no kernel gates with tanh": {"activation": "tanh"},
            "there is no such dimension": {"dim": 2},
            "its size is odd": {"input": X},
        },
    ),
    "highway": (
        {"gate": X, "transformed": X.flip(0), "carried": X.flip(1)},
        {
            "no kernel has highways with tanh": {"activation": "tanh"},
            "operands differ in shape": ({"carried": X[:1]}, {"transformed": X[:1]}),
        },
    ),
    "linear_cross_entropy": (
        LINEAR,
        {
            "input and linear_weight don't fit": {"linear_weight": normal(6, 4)},
            "no classes": {"linear_weight": normal(0, 5)},
            "an unbatched input with a K-dimensional loss": {"input": X[0], "linear_weight": normal(6, 2, 5)},
            "linear_bias doesn't fit linear_weight": {"linear_bias": ONES},
            "options ask for PyTorch's own chunks": {"options": object()},
            "ignore_index for probabilities": {"target": normal(4, 6).softmax(1), "ignore_index": 1},
        },
    ),
    "max_pool2d": (
        {"input": IMAGES, "kernel_size": 2},
        {
            "not a batch of images": {"input": IMAGES[0, 0]},
            "the padding is more than half of the window": {"padding": 2},
            "a window may lie beside the image": {"padding": 1, "dilation": 7},
            "the image is smaller than the window": {"kernel_size": 7},
            "the image is too large": {"dilation": 2**30},
        },
    ),
    "maxout_linear": (
        {"input": X, "weight": normal(2, 3, 5)},
        {
            "the input hasn't as many features as the weight": {"weight": normal(2, 3, 4)},
            "no elements": {"weight": normal(2, 0, 5)},
            "one piece is its own maximum": {"weight": normal(1, 3, 5)},
            "more than 255 pieces": {"weight": normal(256, 1, 5)},
        },
    ),
    "nll_loss": (
        NLL,
        {
            "unknown reduction": {"reduction": "median"},
            "ignore_index is not an integer": {"ignore_index": 1.5},
            "the targets are not int64 indices on the input's device": {"target": CLASSES.int()},
            "the input has no classes": {"input": X[0, 0]},
            "the targets don't fit the input": {"target": CLASSES[:3]},
            "the weights are not one for each class": {"weight": ONES[:4]},
            "the weights require gradients": {"weight": ONES.clone().requires_grad_()},
        },
    ),
    "binary_cross_entropy_with_logits": (
        {"input": X, "target": LABELS},
        {"the weights require gradients": {"weight": ONES.clone().requires_grad_()}},
    ),
    "kl_div": (
        {"input": X.log_softmax(1), "target": LABELS},
        {
            "log_target is not a bool": {"log_target": 1},
            "deprecated arguments together with batchmean": {"reduction": "batchmean", "reduce": True},
        },
    ),
    "rrelu": (
        {"input": X, "training": True},
        {
            "a bound is not a Python number": ({"lower": "0.1"}, {"upper": torch.tensor(0.5)}),
            "the bounds are not in order, or not finite": (
                {"lower": 0.5, "upper": 0.25},
                {"lower": float("-inf")},
                {"upper": float("inf")},
            ),
            "training is not a boolean": {"training": 1},
        },
    ),
    "feature_alpha_dropout": (
        {"input": X, "training": True},  # of as few dimensions as it may have
        {"1 dimensions": {"input": X[0]}, "training is not a boolean": {"training": 1}},
    ),
    "alpha_dropout": ({"input": X[0, 0], "training": True}, {"p is not a Python number": {"p": torch.tensor(0.5)}}),
    "dropout": ({"input": X}, {"training is not a boolean": {"training": 1}, "p is not a Python number": {"p": "a"}}),
    "gelu": ({"input": X}, {"the result goes into a given tensor": {"out": torch.empty(4, 5)}}),
    "softmax": (
        {"input": X, "dim": 1},
        {"no such dimension": {"dim": 2}, "no kernel for torch.int64": {"dtype": torch.int64}},
    ),
    "squareplus": ({"input": X}, {"b is not positive": {"b": 0.0}}),
    "standout": (
        {"input": X, "belief": X.flip(0)},
        {
            "evaluation takes the mean": {"training": False},
            "the belief is of another shape": {"belief": X[:1]},
            "a parameter is not a Python number": ({"alpha": "1"}, {"beta": torch.tensor(1.0)}),
            "a parameter is not finite": ({"alpha": float("nan")}, {"beta": float("inf")}, {"beta": float("-inf")}),
        },
    ),
}


def reasons(name: str, arguments: dict[str, Any], device: str) -> list[str | None]:
    """Of a call's choices, None for those that are kernels; PyTorch may raise its error then."""

    known: dict[int, Any] = {}  # one tensor stays one

    def moved(value: Any) -> Any:
        plain = isinstance(value, Tensor) and value.device.type == "cpu"
        there = value.detach().to(device).requires_grad_(value.requires_grad) if plain else value
        return known.setdefault(id(value), there)

    choices: list[Choice] = []
    with observe_choices(choices.append), suppress(Exception):
        getattr(autograd, name)(**{key: moved(value) for key, value in arguments.items()})
    return [None if choice.kernel else choice.reason for choice in choices if choice.operation != "linear"]


@pytest.mark.whole
@pytest.mark.parametrize("name", FUNCTIONS)
def test_reasons_of_functions(name: str, device: str) -> None:
    arguments, changes = FUNCTIONS[name]
    assert reasons(name, arguments, device) == [None]
    for reason, changed in (
        (reason, changed)
        for reason, each in changes.items()
        for changed in (each if isinstance(each, tuple) else (each,))
    ):
        found = reasons(name, {**arguments, **changed}, device)
        assert reason in found, f"{reason} for {changed}: {found}"
        if "require gradients" in reason and "statistics" not in reason:
            with torch.no_grad():
                assert reasons(name, {**arguments, **changed}, device) == [None]


def recorded(x: Tensor) -> None:
    torch.jit.trace(autograd.relu, x, check_trace=False)


def transformed(x: Tensor) -> None:
    torch.func.grad(lambda x: autograd.relu(x).sum())(x)


def dual(x: Tensor) -> None:
    with forward_ad.dual_level():
        autograd.relu(forward_ad.make_dual(x, x))


def of_inference_mode(x: Tensor) -> None:
    with torch.inference_mode():
        x = x.clone()
    autograd.relu(x, inplace=True)


def weighted_under_autocast(x: Tensor) -> None:
    with torch.autocast(x.device.type, torch.bfloat16):
        autograd.huber_loss(x, x.flip(0), weight=x.abs())


def rejected_by_autocast(x: Tensor) -> None:
    with torch.autocast(x.device.type, torch.bfloat16):
        autograd.binary_cross_entropy(x.sigmoid(), x.sigmoid())


def with_slopes_under_autocast(x: Tensor) -> None:
    with torch.autocast(x.device.type, torch.bfloat16):
        batch_norm_chain(x, None, None, None, None, True, 0.1, 1e-5, slopes=torch.ones_like(x[0, :1]))


def of_too_many_places(x: Tensor) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_kernels, "MOST_PLACES", 4)
        batch_norm_pool(x.unsqueeze(0), None, None, None, None, True, 0.1, 1e-5, maximum=True)


def of_long_samples(x: Tensor) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nll_loss_kernels, "LARGEST_PLACES", 4)
        autograd.nll_loss(x.unsqueeze(0), torch.zeros(1, 5, dtype=torch.int64, device=x.device))


def padded_beyond_the_stride(x: Tensor) -> None:
    convolved = partial(conv_act_pool, 1, activation="relu", activation_parameters=())
    convolved(x, x[:, :1, None].repeat(1, 1, 2), None, 1, 0, 1, 1, 1)


def weighted_in_double_under_autocast(x: Tensor) -> None:
    with torch.autocast(x.device.type, torch.bfloat16):
        autograd.cross_entropy(x, torch.zeros(4, dtype=torch.int64, device=x.device), torch.ones_like(x[0]).double())


SITUATIONS: dict[str, Callable[[Tensor], None]] = {
    "recorded by torch.jit.trace": recorded,
    "inside a torch.func transform": transformed,
    "forward-mode differentiation": dual,
    "in-place on an inference tensor outside of inference mode": of_inference_mode,
    "autocast takes a weighted loss apart": weighted_under_autocast,
    "the weights are of another dtype": weighted_in_double_under_autocast,
    "autocast rejects it": rejected_by_autocast,
    "autocast computes PReLU in its low precision": with_slopes_under_autocast,
    "there are too many places": of_too_many_places,
    "a sample has too many places": of_long_samples,
    "the output padding is not smaller than stride or dilation": padded_beyond_the_stride,
}
#: Of operations that GPUs' autocast alone treats so.
OF_GPUS = ("autocast rejects it",)


@pytest.mark.whole
@pytest.mark.parametrize("reason", SITUATIONS)
def test_reasons_of_situations(reason: str, device: str) -> None:
    choices: list[Choice] = []
    with observe_choices(choices.append), suppress(RuntimeError):
        SITUATIONS[reason](X.to(device))
    expected = None if reason in OF_GPUS and device == "cpu" else reason
    assert [None if one.kernel else one.reason for one in choices if one.operation != "sigmoid"] == [expected]


@contextmanager
def compiling() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        yield patch


def test_reason_of_exporters() -> None:
    with compiling() as patch:
        assert transform_refusal() is None
        patch.setattr(torch.compiler, "_is_exporting_flag", True)
        assert transform_refusal() == "recorded by torch.export"


@pytest.mark.parametrize(
    ("within", "reason"),
    [
        (compiling, "compiled: the compiler decides what is kept"),
        (partial(disable_saved_tensors_hooks, "no"), "hooks of saved tensors are disabled"),
        (lambda: saved_tensors_hooks(torch.clone, torch.clone), "others have hooks on saved tensors"),
    ],
    ids=["compiling", "disabled", "others"],
)
def test_reasons_to_keep_what_could_be_made_again(
    within: Callable[[], AbstractContextManager[Any]], reason: str
) -> None:
    assert reason_to_keep() is None
    with within():
        assert reason_to_keep() == reason


# --- Of optimizers ----------------------------------------------------------------------------------------------------


def of_state(**values: Any) -> Callable[[Any, Tensor], None]:
    def change(optimizer: Any, parameter: Tensor) -> None:
        optimizer.state[parameter].update(values)

    return change


def of_group(**values: Any) -> Callable[[Any, Tensor], None]:
    def change(optimizer: Any, _: Tensor) -> None:
        optimizer.param_groups[0].update(values)

    return change


def expand(_: Any, parameter: Tensor) -> None:
    parameter.data = parameter.data[:1].expand(3, 4)


def forget(optimizer: Any, parameter: Tensor) -> None:
    del optimizer.state[parameter]["exp_avg_sq"]


def infer(_: Any, parameter: Tensor) -> None:
    with torch.inference_mode():
        parameter.grad = torch.ones_like(parameter)


def negate(optimizer: Any, parameter: Tensor) -> None:
    optimizer.state[parameter]["exp_avg"] = torch._neg_view(torch.zeros_like(parameter))


CHANGES: dict[str, Callable[[Any, Tensor], None]] = {
    "a hyperparameter is not finite": of_group(lr=float("nan")),
    "a hyperparameter is a str": of_group(eps="1e-8"),
    "a hyperparameter is not a plain tensor of one number": of_group(lr=torch.tensor([0.1])),
    "a hyperparameter is on another device": of_group(lr=torch.tensor(0.1, device="meta")),
    "a parameter's memory overlaps itself": expand,
    "state is missing": forget,
    "the step is not a tensor": of_state(step=1),
    "the step is on another device": of_state(step=torch.tensor(1.0, device="meta")),
    "states differ in dtype": of_state(exp_avg=torch.zeros(3, 4, dtype=torch.float64)),
    "the gradient differs in dtype from its average": of_state(
        exp_avg=torch.zeros(3, 4, dtype=torch.float64), exp_avg_sq=torch.zeros(3, 4, dtype=torch.float64)
    ),
    "gradient or state is not like its parameter": of_state(exp_avg=torch.zeros(4, 3)),
    "a negated view": negate,
    "a tensor made in inference mode": infer,
}


@pytest.mark.whole
@pytest.mark.parametrize("reason", CHANGES)
def test_reasons_of_optimizers(reason: str, device: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 4, device=device))
    ours = optim.Adam([parameter])
    parameter.grad = torch.ones_like(parameter)
    ours.step()
    assert optim.explain(ours)[0].kernel
    CHANGES[reason](ours, parameter)
    assert optim.explain(ours)[0].reason == reason


def test_reasons_of_capturable_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their steps lie beside the parameters, on a GPU, which meta tensors stand for."""
    monkeypatch.setattr(refusals, "memory_refusal", lambda _: None)
    for device, reason in (("cpu", "capturable is for GPUs"), ("meta", "the step is not on the parameter's device")):
        parameter = torch.nn.Parameter(torch.ones(3, 4, device=device))
        group = {**optim.Adam([parameter]).param_groups[0], "capturable": True}
        state = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        recipe = optim.Adam([parameter])._recipe(group)
        given = (group, recipe, [parameter], [{**state, "step": torch.tensor(1.0)}])
        parameter.grad = torch.ones_like(parameter)
        assert (refusals.tensors_refusal(*given) or refusals.numbers_refusal(group, recipe, parameter.device)) == reason
