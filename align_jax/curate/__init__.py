"""Making training sets: what to keep of noisy image-text pairs, and packing it for random access.

Nothing here runs during training; the packed folders are read by data/sources.py.
"""
