"""Bytes of unknown origin into tensors, with nothing executed: PyTorch's files and TensorFlow's."""
