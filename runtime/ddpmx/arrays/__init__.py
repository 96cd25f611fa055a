"""Anyone's memory without a copy: NumPy, DLPack, the CUDA array interface, and arrays that stay on the GPU."""
