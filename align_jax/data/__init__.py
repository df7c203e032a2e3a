"""Data: sources of image-text pairs, images, tokenizer, training batches. NumPy only, no JAX."""
