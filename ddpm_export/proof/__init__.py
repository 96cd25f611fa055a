"""The record of PyTorch's outputs, and the check of an exported file against it."""
