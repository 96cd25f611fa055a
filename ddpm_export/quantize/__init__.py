"""Files with 8-bit convolutions: calibrated on the model's own chain, written by ONNX Runtime's quantizer."""
