"""Activation layers: drop-in subclasses of ``torch.nn``'s.

Constructors, defaults, repr and state_dict are inherited; only ``forward`` is ours.  Each takes tensors of any shape
and strides, in float16, bfloat16, float32 or float64, and keeps shape, dtype and memory format; whatever else PyTorch
accepts goes to the stock operator, which raises the stock errors.
"""

from torch import Tensor, nn

from ..autograd import activation as functional
from .twin import Layer, Twin

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "SELU",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "Mish",
    "QuickGELU",
    "ReLU",
    "ReLU6",
    "ReLUSquared",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softsign",
    "Squareplus",
    "Tanh",
    "Threshold",
]


class ReLU(Twin, nn.ReLU):
    """relu(x) = max(0, x).  Twin of `torch.nn.ReLU`.

    Saves one bit an element for the backward pass.  Source: Nair and Hinton, "Rectified Linear Units Improve
    Restricted Boltzmann Machines" (ICML 2010).
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu(input, self.inplace)


class ReLU6(Twin, nn.ReLU6):
    """relu6(x) = min(max(0, x), 6).  Twin of `torch.nn.ReLU6`.

    Saves one bit an element for the backward pass.  Source: Howard et al., "MobileNets" (2017).
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardtanh(input, self.min_val, self.max_val, self.inplace)


class ReLUSquared(Layer):
    """relu_squared(x) = max(0, x)^2.

    Saves the input for the backward pass.  Any shape.  Source: So et al., "Primer: Searching for Efficient Transformers
    for Language Modeling" (2021).
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu_squared(input)


class LeakyReLU(Twin, nn.LeakyReLU):
    """leaky_relu(x) = max(0, x) + negative_slope min(0, x).  Twin of `torch.nn.LeakyReLU`.

    Saves one bit an element for the backward pass.  Source: Maas, Hannun, Ng, "Rectifier Nonlinearities Improve
    Neural Network Acoustic Models" (2013).
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.leaky_relu(input, self.negative_slope, self.inplace)


class Threshold(Twin, nn.Threshold):
    """threshold(x) = x where x > threshold, else value.  Twin of `torch.nn.Threshold`.

    Saves one bit an element for the backward pass.  Source: PyTorch's page of ``torch.nn.Threshold``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.threshold(input, self.threshold, self.value, self.inplace)


class Hardtanh(Twin, nn.Hardtanh):
    """hardtanh(x) = min(max(min_val, x), max_val).  Twin of `torch.nn.Hardtanh`.

    Saves one bit an element for the backward pass.  Source: PyTorch's page of ``torch.nn.Hardtanh``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardtanh(input, self.min_val, self.max_val, self.inplace)


class Hardsigmoid(Twin, nn.Hardsigmoid):
    """hardsigmoid(x) = min(max(0, x + 3), 6) / 6.  Twin of `torch.nn.Hardsigmoid`.

    Saves one bit an element for the backward pass.  Source: Howard et al., "Searching for MobileNetV3" (ICCV
    2019).
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardsigmoid(input, self.inplace)


class Hardswish(Twin, nn.Hardswish):
    """hardswish(x) = x min(max(0, x + 3), 6) / 6.  Twin of `torch.nn.Hardswish`.

    Saves the input for the backward pass.  Source: Howard et al., "Searching for MobileNetV3" (ICCV 2019).
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardswish(input, self.inplace)


class ELU(Twin, nn.ELU):
    """elu(x) = max(0, x) + min(0, alpha (exp(x) - 1)).  Twin of `torch.nn.ELU`.

    Saves the input for the backward pass; in place the output, in 16 bits a copy of the input.
    Source: Clevert, Unterthiner, Hochreiter, "Fast and Accurate Deep
    Network Learning by Exponential Linear Units" (ICLR 2016).
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.elu(input, self.alpha, self.inplace)


class SELU(Twin, nn.SELU):
    """selu(x) = scale (max(0, x) + min(0, alpha (exp(x) - 1))), scale = 1.0507..., alpha = 1.6733....  Twin of
    `torch.nn.SELU`.

    Saves the input for the backward pass; in place the output, in 16 bits a copy of the input.
    Source: Klambauer, Unterthiner, Mayr, Hochreiter, "Self-Normalizing
    Neural Networks" (NeurIPS 2017).
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.selu(input, self.inplace)


class CELU(Twin, nn.CELU):
    """celu(x) = max(0, x) + min(0, alpha (exp(x / alpha) - 1)).  Twin of `torch.nn.CELU`.

    Saves the input for the backward pass; in place the output, in 16 bits a copy of the input.
    Source: Barron, "Continuously Differentiable Exponential Linear
    Units" (2017).
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.celu(input, self.alpha, self.inplace)


class GELU(Twin, nn.GELU):
    """gelu(x) = x Phi(x), or 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) with approximate="tanh".  Twin of
    `torch.nn.GELU`.

    Saves the input for the backward pass.  Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016).
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu(input, approximate=self.approximate)


class SiLU(Twin, nn.SiLU):
    """silu(x) = x sigmoid(x).  Twin of `torch.nn.SiLU`.

    Saves the input for the backward pass.  Source: Elfwing, Uchibe, Doya, "Sigmoid-Weighted Linear Units"
    (2017).
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.silu(input, self.inplace)


class QuickGELU(Layer):
    """quick_gelu(x) = x sigmoid(1.702 x), nearly GELU.

    Saves the input for the backward pass.  Any shape.  Source: Hendrycks and Gimpel, "Gaussian Error Linear Units"
    (2016).
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.quick_gelu(input)


class Mish(Twin, nn.Mish):
    """mish(x) = x tanh(softplus(x)).  Twin of `torch.nn.Mish`.

    Saves the input for the backward pass.  Source: Misra, "Mish: A Self Regularized Non-Monotonic Activation
    Function" (BMVC 2020).
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.mish(input, self.inplace)


class Softplus(Twin, nn.Softplus):
    """softplus(x) = log(1 + exp(beta x)) / beta, and x where beta x > threshold.  Twin of `torch.nn.Softplus`.

    Saves the input for the backward pass.  Source: PyTorch's page of ``torch.nn.Softplus``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.softplus(input, self.beta, self.threshold)


class Softsign(Twin, nn.Softsign):
    """softsign(x) = x / (1 + |x|).  Twin of `torch.nn.Softsign`.

    Saves the input for the backward pass.  Source: PyTorch's page of ``torch.nn.Softsign``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.softsign(input)


class Squareplus(Layer):
    """squareplus(x) = (x + sqrt(x^2 + b)) / 2, a softplus of algebra alone.

    Saves the input for the backward pass.  Any shape.

    Args:
        b: how wide it is bent, positive: ReLU's limit is 0, and 4 has softplus's curvature at the origin.

    Source: Barron, "Squareplus: A Softplus-Like Algebraic Rectifier" (2021).
    """

    def __init__(self, b: float = 4.0) -> None:
        super().__init__()
        self.b = b

    def forward(self, input: Tensor) -> Tensor:
        return functional.squareplus(input, self.b)

    def extra_repr(self) -> str:
        return f"b={self.b}"


class Sigmoid(Twin, nn.Sigmoid):
    """sigmoid(x) = 1 / (1 + exp(-x)).  Twin of `torch.nn.Sigmoid`.

    Saves the output for the backward pass.  Source: PyTorch's page of ``torch.nn.Sigmoid``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.sigmoid(input)


class LogSigmoid(Twin, nn.LogSigmoid):
    """logsigmoid(x) = log(1 / (1 + exp(-x))).  Twin of `torch.nn.LogSigmoid`.

    Saves the input for the backward pass.  Source: PyTorch's page of ``torch.nn.LogSigmoid``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.logsigmoid(input)


class Tanh(Twin, nn.Tanh):
    """tanh(x) = (exp(x) - exp(-x)) / (exp(x) + exp(-x)).  Twin of `torch.nn.Tanh`.

    Saves the output for the backward pass.  Source: PyTorch's page of ``torch.nn.Tanh``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.tanh(input)
