"""A kernel of your own, and the proof that it can take the place of PyTorch's operators.

On a GPU: ``python examples/prove_a_kernel.py``.  Without one: ``TRITON_INTERPRET=1 python examples/prove_a_kernel.py``.
"""

import torch
import triton
import triton.language as tl

from fusednn.testing import check_drop_in, measure_traffic, random_tensor, saved_tensors


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


@triton.jit
def quick_gelu_kernel(x_pointer, y_pointer, numel, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_pointer + place, place < numel).to(tl.float32)
    tl.store(y_pointer + place, x * tl.sigmoid(1.702 * x), place < numel)


class QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        x = x if x.is_contiguous() else x.clone()  # dense, in its memory format
        y = torch.empty_like(x)
        quick_gelu_kernel[triton.cdiv(x.numel(), 1024),](x, y, x.numel(), BLOCK=1024)
        return y

    @staticmethod
    def backward(ctx, g):  # in PyTorch's operators: it has a derivative itself
        (x,) = ctx.saved_tensors
        slope = 1.702 * x.float()
        return (g * torch.sigmoid(slope) * (1 + slope * torch.sigmoid(-slope))).to(x.dtype)


def fused_quick_gelu(x):
    taken = isinstance(x, torch.Tensor) and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return QuickGELU.apply(x) if taken else quick_gelu(x)


def main():
    x = random_tensor((2, 3, 4, 5), torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    print(check_drop_in(fused_quick_gelu, quick_gelu, [x], dtypes=(torch.float32, torch.bfloat16, torch.float16)))
    with measure_traffic() as traffic, saved_tensors() as kept:  # kernels are counted in the interpreter
        fused_quick_gelu(x.requires_grad_())
    print(
        f"{traffic.launches} launch, {traffic.bytes} bytes for {x.nbytes}; {kept.bytes_beside(x)} bytes kept beside x"
    )


if __name__ == "__main__":
    main()
