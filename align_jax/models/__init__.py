"""Towers (Flax Linen). Code outside this package uses `dual_encoder` and never sees Flax."""
