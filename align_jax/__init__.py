"""align_jax: train, evaluate and use ALIGN (EfficientNet + BERT) in JAX. Importing it is free."""

__version__ = "0.1.0"
