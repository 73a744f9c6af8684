"""Every layer and function on PyTorch's own ModuleInfo and OpInfo samples, against stock: value, gradients, errors."""

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from support.device import FLOAT_DTYPES, KERNELS_RUN
from support.pytorch_samples import OPERATORS, SAMPLED, inherent_error, module_pairs
from torch import nn
from torch.testing._internal.common_modules import ModuleErrorEnum

import fusednn
from fusednn.layers.twin import TWINS
from fusednn.testing import assert_same_bits
from fusednn.testing.outcome import Outcome, assert_outcome, evaluate
from fusednn.testing.pytorch_samples import module_errors, operator_samples

every_module = pytest.mark.parametrize("stock_class", SAMPLED, ids=lambda cls: cls.__name__)
every_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _quiet() -> Iterable[None]:
    """The samples use what is deprecated, too, and stock says so each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@every_module
@every_dtype
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.smoke
def test_module_info_samples(stock_class: type[nn.Module], dtype: torch.dtype, training: bool, device: str) -> None:
    if stock_class is nn.RReLU and training and dtype is torch.float16 and not KERNELS_RUN:
        pytest.skip("stock has no random RReLU in float16 on a CPU")
    count = 0
    for stock, ours, sample in module_pairs(stock_class, device, dtype, training=training):
        if stock_class is nn.RReLU:
            stock.eval()  # the bounds are equal, and stock's training has no float16 on a CPU
        mine, theirs, reference = (
            run(module, sample.forward_input, kind)
            for module, kind in ((ours, None), (stock, None), (stock, torch.float64))
        )
        assert_outcome(mine, theirs, reference, inherent_error(stock_class.__name__, dtype))
        count += 1
    assert count


def run(module: nn.Module, forward: Any, dtype: torch.dtype | None = None) -> Outcome:
    """Evaluate a copy of the module, its parameters among the operands and its buffers among what it may update."""
    module = copy.deepcopy(module).to(dtype)
    if dtype is not None and getattr(module, "options", None) is not None:
        module.options = None  # of how a loss is computed, for one dtype
    inplace = bool(getattr(module, "inplace", False))
    outcome = evaluate(module, forward.args, forward.kwargs, dtype, list(module.parameters()), inplace=inplace)
    return outcome._replace(updated=outcome.updated + list(module.buffers()))


@every_module
def test_module_info_errors(stock_class: type[nn.Module], device: str) -> None:
    for error in module_errors(stock_class, device):
        sample = error.module_error_input
        arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                TWINS[stock_class](*arguments, **options)
        else:
            module = TWINS[stock_class](*arguments, **options).to(device)
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*sample.forward_input.args, **sample.forward_input.kwargs)


@pytest.mark.parametrize("info", OPERATORS, ids=lambda info: info.full_name)
@every_dtype
def test_op_info_samples(info: Any, dtype: torch.dtype, device: str) -> None:
    """The functions, on every sample of PyTorch's operator tests: also integers, complex numbers and odd shapes."""
    ours = our_function(info)
    others = {torch.int64, torch.complex64} if dtype is torch.float32 else set()
    for kind in info.dtypes & ({dtype} | others):
        for sample in operator_samples(info, device, kind):
            if draws(info.name, sample):
                continue  # other numbers than stock's
            options = dict(sample.kwargs)
            if options.get("training") and "upper" in options:
                options["lower"] = options["upper"]  # random slopes: equal bounds leave one right answer
            inplace = bool(options.get("inplace"))
            operands = (sample.input, *sample.args)
            mine, theirs = (evaluate(function, operands, options, inplace=inplace) for function in (ours, info.op))
            if kind.is_floating_point:
                options.pop("options", None)  # of how a loss is computed, for one dtype
                reference = evaluate(info.op, operands, options, torch.float64, inplace=inplace)
                assert_outcome(mine, theirs, reference, inherent_error(info.name, dtype))
            else:
                assert_same_bits(*(outcome.outputs[0] for outcome in (mine, theirs)))


@pytest.mark.thorough
@pytest.mark.parametrize("info", OPERATORS, ids=lambda info: info.full_name)
def test_op_info_noncontiguous_samples(info: Any, device: str) -> None:
    for sample in operator_samples(info, device, torch.float32)[::5]:
        if draws(info.name, sample) or (sample.kwargs.get("training") and "upper" in sample.kwargs):
            continue  # other numbers than stock's
        strided = sample.noncontiguous()
        options = dict(strided.kwargs)
        inplace = bool(options.get("inplace"))
        operands = (strided.input, *strided.args)
        mine, theirs = (evaluate(f, operands, options, inplace=inplace) for f in (our_function(info), info.op))
        options.pop("options", None)  # of how a loss is computed, for one dtype
        reference = evaluate(info.op, operands, options, torch.float64, inplace=inplace)
        assert_outcome(mine, theirs, reference, inherent_error(info.name, torch.float32))


def our_function(info: Any) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(fusednn.autograd, info.name.removeprefix("nn.functional."))
    return function


def draws(name: str, sample: Any) -> bool:
    """Whether the sample's result is random."""
    if "dropout" not in name:
        return False
    arguments = dict(zip(("p", "training"), sample.args, strict=False)) | sample.kwargs
    return arguments.get("training", "alpha" not in name) and 0 < arguments.get("p", 0.5) < 1


@pytest.mark.parametrize(
    "info", [info for info in OPERATORS if info.error_inputs_func is not None], ids=lambda info: info.full_name
)
def test_op_info_errors(info: Any, device: str) -> None:
    for error in info.error_inputs(torch.device(device)):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            our_function(info)(sample.input, *sample.args, **sample.kwargs)
