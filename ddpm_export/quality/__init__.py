"""Samples against real images by a network's features of them: FID and its kin, by torch-fidelity."""
