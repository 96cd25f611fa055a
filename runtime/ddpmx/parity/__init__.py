"""Is this file still the PyTorch model? A record of what PyTorch answered, a ladder to climb, a report to read."""
