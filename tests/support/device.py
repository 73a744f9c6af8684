"""Where the tests run: CUDA where there is a GPU, otherwise the CPU, with kernels or without."""

import torch

from fusednn.kernels import AVAILABLE, ON_CPU

ON_GPU = torch.cuda.is_available() and not ON_CPU
DEVICE = "cuda" if ON_GPU else "cpu"
#: Whether kernels run here: in the interpreter, compiled on the virtual GPU, or on a GPU.
KERNELS_RUN = AVAILABLE and (ON_CPU or ON_GPU)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
