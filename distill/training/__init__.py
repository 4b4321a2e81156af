"""Training: losses, packing, the loop. Batches and a loss come in, weights, metrics and a cost go out."""
