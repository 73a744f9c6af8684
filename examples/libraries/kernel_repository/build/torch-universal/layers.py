"""What ``kernelize`` puts in the place of a layer's ``forward``: methods of fusednn's twins, which have no state of
their own and read the options of the layer that they are called on.
"""

from torch import nn

import fusednn

__all__ = ["GELU", "BatchNorm2d", "ReLU", "SiLU"]


class BatchNorm2d(nn.Module):
    can_torch_compile = True
    forward = fusednn.layers.BatchNorm2d.forward


class GELU(nn.Module):
    can_torch_compile = True
    forward = fusednn.layers.GELU.forward


class ReLU(nn.Module):
    can_torch_compile = True
    forward = fusednn.layers.ReLU.forward


class SiLU(nn.Module):
    can_torch_compile = True
    forward = fusednn.layers.SiLU.forward
