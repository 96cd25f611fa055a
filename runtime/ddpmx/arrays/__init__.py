"""Arrays of other libraries without a copy: NumPy, DLPack, the CUDA array interface, and arrays that stay on the GPU."""
