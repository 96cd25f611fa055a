"""From bytes to checked values, with nothing executed: model files, their metadata, and atomic writes."""
