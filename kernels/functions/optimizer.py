"""What each optimizer does to an element: the coefficients of a step (float64 scalars), and the update with them."""

from dataclasses import dataclass
from typing import Any

import torch

from ..base._triton import tl, triton
from ..base.numerics import divide, exp, expm1, log, square_root

__all__ = ["ALGORITHMS", "Algorithm"]


@triton.jit
def power(base, exponent):
    return exp(exponent * log(base))


@triton.jit
def bias_correction(beta, step):
    """1 - beta^step, without cancellation."""
    return -expm1(step * log(beta))


@triton.jit
def lerp(start, end, weight):
    """PyTorch's formula: exactly ``end`` for a weight of 1."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1 - weight))


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sgd_coefficients(lr, momentum, dampening, c, eps, step, mu_product):
    # In its first step the buffer becomes the gradient.
    return lr, tl.where(step <= 1, 0.0, momentum), tl.where(step <= 1, 1.0, 1 - dampening), momentum


@triton.jit
def sgd(w, g, states, k):
    return w - k[0] * g, states


@triton.jit
def sgd_momentum(w, g, states, k):
    buffer = states[0] * k[1] + k[2] * g
    return w - k[0] * buffer, (buffer,)


@triton.jit
def sgd_nesterov(w, g, states, k):
    buffer = states[0] * k[1] + k[2] * g
    return w - k[0] * (g + k[3] * buffer), (buffer,)


@triton.jit
def adagrad_coefficients(lr, lr_decay, b, c, eps, step, mu_product):
    return lr / (1 + (step - 1) * lr_decay), eps


@triton.jit
def adagrad(w, g, states, k):
    total = states[0] + g * g
    return w - divide(k[0] * g, square_root(total) + k[1]), (total,)


@triton.jit
def adadelta_coefficients(lr, rho, b, c, eps, step, mu_product):
    return lr, rho, 1 - rho, eps


@triton.jit
def adadelta(w, g, states, k):
    square_avg, acc_delta = states
    square_avg = square_avg * k[1] + k[2] * g * g
    delta = divide(square_root(acc_delta + k[3]), square_root(square_avg + k[3])) * g
    acc_delta = acc_delta * k[1] + k[2] * delta * delta
    return w - k[0] * delta, (square_avg, acc_delta)


@triton.jit
def rmsprop_coefficients(lr, alpha, momentum, c, eps, step, mu_product):
    return lr, alpha, 1 - alpha, momentum, eps


@triton.jit
def rmsprop(w, g, states, k):
    square_avg = states[0] * k[1] + k[2] * g * g
    return w - divide(k[0] * g, square_root(square_avg) + k[4]), (square_avg,)


@triton.jit
def rmsprop_momentum(w, g, states, k):
    square_avg, buffer = states
    square_avg = square_avg * k[1] + k[2] * g * g
    buffer = buffer * k[3] + divide(g, square_root(square_avg) + k[4])
    return w - k[0] * buffer, (square_avg, buffer)


@triton.jit
def rmsprop_nesterov(w, g, states, k):
    square_avg, buffer = states
    square_avg = square_avg * k[1] + k[2] * g * g
    scaled = divide(g, square_root(square_avg) + k[4])
    buffer = buffer * k[3] + scaled
    return w - k[0] * (scaled + k[3] * buffer), (square_avg, buffer)


@triton.jit
def centered_parts(g, square_avg, grad_avg, k):
    """New averages of the gradient's square and of itself, and the gradient over its deviation."""
    square_avg = square_avg * k[1] + k[2] * g * g
    grad_avg = lerp(grad_avg, g, k[2])
    return square_avg, grad_avg, square_root(square_avg - grad_avg * grad_avg) + k[4]


@triton.jit
def rmsprop_centered(w, g, states, k):
    square_avg, grad_avg, deviation = centered_parts(g, states[0], states[1], k)
    return w - divide(k[0] * g, deviation), (square_avg, grad_avg)


@triton.jit
def rmsprop_centered_momentum(w, g, states, k):
    square_avg, grad_avg, deviation = centered_parts(g, states[0], states[1], k)
    buffer = states[2] * k[3] + divide(g, deviation)
    return w - k[0] * buffer, (square_avg, grad_avg, buffer)


@triton.jit
def rmsprop_centered_nesterov(w, g, states, k):
    square_avg, grad_avg, deviation = centered_parts(g, states[0], states[1], k)
    scaled = divide(g, deviation)
    buffer = states[2] * k[3] + scaled
    return w - k[0] * (scaled + k[3] * buffer), (square_avg, grad_avg, buffer)


@triton.jit
def adam_coefficients(lr, beta1, beta2, c, eps, step, mu_product):
    # lr / c1 m / (sqrt(v) / c2 + eps) = lr c2 / c1 m / (sqrt(v) + eps c2), with c2 the root of its correction.
    c2 = square_root(bias_correction(beta2, step))
    return lr * c2 / bias_correction(beta1, step), 1 - beta1, beta2, 1 - beta2, eps * c2


@triton.jit
def adam(w, g, states, k):
    exp_avg, exp_avg_sq = states
    exp_avg = lerp(exp_avg, g, k[1])
    exp_avg_sq = exp_avg_sq * k[2] + k[3] * g * g
    return w - divide(k[0] * exp_avg, square_root(exp_avg_sq) + k[4]), (exp_avg, exp_avg_sq)


@triton.jit
def adam_amsgrad(w, g, states, k):
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    exp_avg = lerp(exp_avg, g, k[1])
    exp_avg_sq = exp_avg_sq * k[2] + k[3] * g * g
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
    return w - divide(k[0] * exp_avg, square_root(max_exp_avg_sq) + k[4]), (exp_avg, exp_avg_sq, max_exp_avg_sq)


@triton.jit
def adamax_coefficients(lr, beta1, beta2, c, eps, step, mu_product):
    return lr / bias_correction(beta1, step), 1 - beta1, beta2, eps


@triton.jit
def adamax(w, g, states, k):
    exp_avg, exp_inf = states
    exp_avg = lerp(exp_avg, g, k[1])
    exp_inf = maximum(exp_inf * k[2], tl.abs(g) + k[3])
    return w - divide(k[0] * exp_avg, exp_inf), (exp_avg, exp_inf)


@triton.jit
def nadam_coefficients(lr, beta1, beta2, momentum_decay, eps, step, mu_product):
    base = tl.full((), 0.96, tl.float64)
    mu = beta1 * (1 - 0.5 * power(base, step * momentum_decay))
    mu_next = beta1 * (1 - 0.5 * power(base, (step + 1) * momentum_decay))
    c2 = square_root(bias_correction(beta2, step))
    of_gradient = lr * c2 * (1 - mu) / (1 - mu_product)
    of_average = lr * c2 * mu_next / (1 - mu_product * mu_next)
    return of_gradient, of_average, 1 - beta1, beta2, 1 - beta2, eps * c2


@triton.jit
def nadam(w, g, states, k):
    exp_avg, exp_avg_sq = states
    exp_avg = lerp(exp_avg, g, k[2])
    exp_avg_sq = exp_avg_sq * k[3] + k[4] * g * g
    return w - divide(k[0] * g + k[1] * exp_avg, square_root(exp_avg_sq) + k[5]), (exp_avg, exp_avg_sq)


@triton.jit
def radam_coefficients(lr, beta1, beta2, c, eps, step, mu_product):
    c2 = bias_correction(beta2, step)
    limit = 2 / (1 - beta2) - 1  # of the length of the simple moving average that the exponential one stands for
    length = limit - 2 * step * power(beta2, step) / c2
    rectified = length > 5
    rectifier = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
    factor = tl.where(rectified, square_root(tl.where(rectified, rectifier * c2, 1.0)), 1.0)
    return lr / bias_correction(beta1, step) * factor, 1 - beta1, beta2, 1 - beta2, eps, tl.where(rectified, 1.0, 0.0)


@triton.jit
def radam(w, g, states, k):
    exp_avg, exp_avg_sq = states
    exp_avg = lerp(exp_avg, g, k[1])
    exp_avg_sq = exp_avg_sq * k[2] + k[3] * g * g
    return w - divide(k[0] * exp_avg, tl.where(k[5] > 0, square_root(exp_avg_sq) + k[4], 1.0)), (exp_avg, exp_avg_sq)


@triton.jit
def lion_coefficients(lr, beta1, beta2, c, eps, step, mu_product):
    return lr, beta1, 1 - beta1, beta2, 1 - beta2


@triton.jit
def lion(w, g, states, k):
    exp_avg = states[0]
    direction = exp_avg * k[1] + k[2] * g
    change = tl.where(direction > 0, k[0], tl.where(direction < 0, -k[0], k[0] * 0))  # no number moves nothing
    return w - change, (exp_avg * k[3] + k[4] * g,)


@dataclass(frozen=True)
class Algorithm:
    """An optimizer's update, and what is to be known of it.

    ``coefficients(lr, a, b, c, eps, step, mu_product)`` gives a tuple of float64 scalars, which ``update(w, g, states,
    coefficients)`` gets rounded to the type that it computes in; it returns the new weights and states.  ``states`` are
    their keys, as ``torch.optim`` calls them.

    ``counted`` says whether steps are counted in the state; ``made_lazily``, that stock leaves it to the first update
    to make the state; ``lerped``, that stock's update takes an average with ``lerp_``, which refuses gradients of
    another dtype.
    """

    name: str
    coefficients: Any
    update: Any
    states: tuple[str, ...] = ()
    counted: bool = True
    made_lazily: bool = False
    lerped: bool = False

    def budget(self, numel: int, dtype: torch.dtype) -> int:
        """Bytes that an update must move: gradient read, weight and state read and written."""
        return numel * dtype.itemsize * (3 + 2 * len(self.states))


# States that several updates keep.
_BUFFER = ("momentum_buffer",)
_CENTERED = ("square_avg", "grad_avg")
_MOMENTS = ("exp_avg", "exp_avg_sq")

#: Every update, by name.
ALGORITHMS: dict[str, Algorithm] = {
    row.name: row
    for row in (
        Algorithm("sgd", sgd_coefficients, sgd, counted=False),
        Algorithm("sgd_momentum", sgd_coefficients, sgd_momentum, _BUFFER, counted=False, made_lazily=True),
        Algorithm("sgd_nesterov", sgd_coefficients, sgd_nesterov, _BUFFER, counted=False, made_lazily=True),
        Algorithm("adagrad", adagrad_coefficients, adagrad, ("sum",)),
        Algorithm("adadelta", adadelta_coefficients, adadelta, ("square_avg", "acc_delta")),
        Algorithm("rmsprop", rmsprop_coefficients, rmsprop, ("square_avg",)),
        Algorithm("rmsprop_momentum", rmsprop_coefficients, rmsprop_momentum, ("square_avg", *_BUFFER)),
        Algorithm("rmsprop_nesterov", rmsprop_coefficients, rmsprop_nesterov, ("square_avg", *_BUFFER)),
        Algorithm("rmsprop_centered", rmsprop_coefficients, rmsprop_centered, _CENTERED, lerped=True),
        Algorithm(
            *("rmsprop_centered_momentum", rmsprop_coefficients, rmsprop_centered_momentum, (*_CENTERED, *_BUFFER)),
            lerped=True,
        ),
        Algorithm(
            *("rmsprop_centered_nesterov", rmsprop_coefficients, rmsprop_centered_nesterov, (*_CENTERED, *_BUFFER)),
            lerped=True,
        ),
        Algorithm("adam", adam_coefficients, adam, _MOMENTS, lerped=True),
        Algorithm("adam_amsgrad", adam_coefficients, adam_amsgrad, (*_MOMENTS, "max_exp_avg_sq"), lerped=True),
        Algorithm("adamax", adamax_coefficients, adamax, ("exp_avg", "exp_inf"), lerped=True),
        Algorithm("nadam", nadam_coefficients, nadam, _MOMENTS, lerped=True),
        Algorithm("radam", radam_coefficients, radam, _MOMENTS, lerped=True),
        Algorithm("lion", lion_coefficients, lion, ("exp_avg",), counted=False),
    )
}
