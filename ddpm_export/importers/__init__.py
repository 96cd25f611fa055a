"""Other people's checkpoints: recognised, understood, imported, and given back. One module per project."""
