"""Models that leave the house: programs that run where align_jax is not installed."""
