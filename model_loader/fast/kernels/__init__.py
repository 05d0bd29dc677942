"""Triton kernels. Imported only by triton_ops, and only where Triton is installed and a GPU will run them."""
