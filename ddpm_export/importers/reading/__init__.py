"""Files of unknown origin read into tensors, without executing anything in them: PyTorch's and TensorFlow's."""
