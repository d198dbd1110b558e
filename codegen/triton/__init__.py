"""The CUDA target: Triton kernels for the ops of the vocabulary, and what it takes to launch them."""
