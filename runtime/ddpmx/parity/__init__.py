"""Is a file still the PyTorch model? A record of PyTorch's outputs, checks against it, and a report."""
