"""Instruments that need no GPU, for tests, benchmarks and the command line.

`compile_check` compiles every shipped kernel for GPUs that aren't there and reads the machine code; `traffic` counts
the bytes and launches of a call in Triton's interpreter; `launches` counts them without running kernels;
`saved_tensors` counts what autograd keeps.  Import them by name: the first needs Triton.
"""
