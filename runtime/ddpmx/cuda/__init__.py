"""The reverse chain on an NVIDIA GPU: its kernels, and three executors that launch them with equal results."""
