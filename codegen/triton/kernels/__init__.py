"""Triton kernels. The only modules that import triton; `codegen.triton.launch` loads them when a kernel is needed."""
