"""ε-networks in PyTorch, and the registry by which a checkpoint names its own."""
