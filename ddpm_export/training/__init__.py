"""From images to a checkpoint: data, the loss, the loop, exact resume."""
