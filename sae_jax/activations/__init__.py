"""Real activations: extracted from models, stored as datasets, read back in a reproducible order."""
