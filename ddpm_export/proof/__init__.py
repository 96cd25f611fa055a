"""The record of what PyTorch answers, and an exported file held against it."""
