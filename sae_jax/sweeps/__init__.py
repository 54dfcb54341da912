"""Many models and layers, one table."""
