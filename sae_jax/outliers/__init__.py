"""What activations say of death before any training: moments and gamma, laws, probes, and preprocessing that folds."""
