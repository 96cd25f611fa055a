"""Many requests on one network."""
