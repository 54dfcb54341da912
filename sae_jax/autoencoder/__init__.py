"""The SAE as a pytree, its top-k kernels and gradients, the loss, the optimizer, and which firing counts. Pure JAX."""
