"""From noisy web pairs to a training set, in the order of use: scan (sizes and hashes of images),
filter/ (which pairs to keep), near_duplicates/ (what an evaluation set holds already), pack/ (a
dataset with random access).

Nothing here runs during training; packed folders are read by data/sources/packed.py.
"""
