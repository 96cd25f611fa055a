"""A sampler's table, run over a batch of images on the host: the update, the loop, conditioning, pixels."""
