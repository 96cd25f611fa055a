"""What a chain costs here: milliseconds per step, beside the bare network."""
