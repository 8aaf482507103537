"""GPU kernels and their definitions in plain jax.numpy: arrays in, arrays out."""
