"""Activations and optimizer state on the host while no step needs them."""
