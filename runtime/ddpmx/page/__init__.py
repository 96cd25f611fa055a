"""A static page that runs a model's whole chain in the visitor's browser."""
