"""Pre-train language models faster with 2:4 and V:N:M sparsity, in JAX and Pallas."""
