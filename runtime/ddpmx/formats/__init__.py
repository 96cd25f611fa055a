"""From bytes to checked values, with nothing executed: model files, what they say about themselves, writing whole files."""
