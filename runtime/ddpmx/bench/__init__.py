"""Measures the speed of a chain on this machine, next to the speed of its network alone."""
