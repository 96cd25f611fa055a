"""Other projects' checkpoints: recognised, imported, and converted back. One module per project."""
