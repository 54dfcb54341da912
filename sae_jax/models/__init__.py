"""Networks that make activations, and the one door to every source of them."""
