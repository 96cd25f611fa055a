"""A network as an ONNX graph: precision, names, metadata."""
