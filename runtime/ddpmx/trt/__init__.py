"""TensorRT as a tool: which one is here, building a plan, its precision, and whether a plan fits this machine."""
