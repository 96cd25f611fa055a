"""The trained models that come along with ddpmx, and their names."""
