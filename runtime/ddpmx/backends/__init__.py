"""One network, run once: an ONNX file by ONNX Runtime, or a plan by TensorRT."""
