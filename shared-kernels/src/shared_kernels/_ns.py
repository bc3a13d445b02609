"""The namespace of our operators in PyTorch's registry. The Hub export replaces this file, and only this file."""

NAMESPACE = "shared_kernels"
