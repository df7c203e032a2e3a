"""Hugging Face in and out: hub finds a folder, config reads it, weights opens its tensors, convert
gives them our names, processor says how inputs are prepared, model_card describes what is written.
"""
