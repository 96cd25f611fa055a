"""TensorRT as a tool: loading it, building plans, checking their precision, and whether a plan fits this machine."""
