"""PyTorch's own test cases of modules and losses (``torch.testing._internal.common_nn``), run on ours.

Each compares with a reference, checks first and second derivatives numerically, batched and forward ones where stock
has them, strided operands, pickling and casts.
"""

import warnings
from typing import Any

import pytest
import support.pytorch_samples  # noqa: F401  provides what the import below needs
from torch import Tensor, nn
from torch.testing._internal import common_nn

import fusednn
from fusednn.autograd.dispatch import Choice, observe_choices
from fusednn.kernels import ON_CPU
from fusednn.layers.twin import TWINS


class Calls(common_nn.NNTestCase):
    """How PyTorch's cases call modules; its own class of that name isn't in the wheel."""

    def runTest(self) -> None:  # noqa: N802  without it there can be no instance
        pass

    def _forward(self, module: nn.Module, input: Any) -> Tensor:
        with common_nn.freeze_rng_state():
            return module(*input) if isinstance(input, tuple) else module(input)

    def _forward_criterion(self, module: nn.Module, input: Any, target: Tensor, extra_args: Any = ()) -> Tensor:
        return self._forward(module, (*input, target) if isinstance(input, tuple) else (input, target))

    def _backward(self, module: nn.Module, input: Any, output: Tensor, grad_output: Tensor, **options: Any) -> Any:
        output.backward(grad_output, retain_graph=True, **options)
        return tuple(x.grad for x in input) if isinstance(input, tuple) else input.grad

    def _get_parameters(self, module: nn.Module) -> tuple[list[nn.Parameter], list[Tensor | None]]:
        return list(module.parameters()), [parameter.grad for parameter in module.parameters()]

    def _zero_grad_parameters(self, module: nn.Module) -> None:
        module.zero_grad(set_to_none=False)


def name_of(case: dict[str, Any]) -> str:
    name = case.get("fullname") or "_".join(filter(None, (case["module_name"], case.get("desc"))))
    return str(name)


with fusednn.replace_functions():  # which some of the cases look up here, others where they are called
    _MODULE_CASES = (*common_nn.module_tests, *common_nn.get_new_module_tests())
_PREFIXES = (*(cls.__name__ for cls in TWINS), "softmax", "log_softmax")
_CASES = [
    (kind, case)
    for kind, cases in (
        (common_nn.NewModuleTest, _MODULE_CASES),
        (common_nn.CriterionTest, common_nn.criterion_tests),
    )
    for case in cases
    if name_of(case).startswith(_PREFIXES) and not name_of(case).startswith("Tanhshrink")
]


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        pytest.param(kind, case, id=name_of(case), marks=[] if index % 12 == 0 else pytest.mark.thorough)
        for index, (kind, case) in enumerate(_CASES)
    ],
)
def test_cases_of_pytorch(kind: type[Any], case: dict[str, Any]) -> None:
    options = dict(case)
    stock = options.pop("constructor", None) or getattr(nn, options.pop("module_name"))
    options.pop("module_name", None)

    def ours(*arguments: Any, **keywords: Any) -> nn.Module:
        module = stock(*arguments, **keywords)
        fusednn.replace_layers(module)
        return module

    choices: list[Choice] = []
    with warnings.catch_warnings(), fusednn.replace_functions(), observe_choices(choices.append):
        warnings.simplefilter("ignore")
        kind(ours, **options)(Calls())
    assert choices
    if ON_CPU and "Conv" not in name_of(case) and "complex" not in name_of(case):
        assert any(choice.kernel for choice in choices)
