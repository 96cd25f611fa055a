"""What one does with a chain beside drawing from it: each task a file, in NumPy, around the network of a pipeline."""
