"""A Llama trainer that uses sparsejax: data, model, steps, checkpoints and the command line."""
