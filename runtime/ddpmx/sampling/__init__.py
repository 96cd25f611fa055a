"""Runs a sampler's table over a batch of images on the host: the update, the loop, conditioning, pixels."""
