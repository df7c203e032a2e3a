"""Packing pairs for random access: pack is the way in. unit writes one part, finish joins the parts
into a TFDS dataset, beam runs units elsewhere, key_lists says which pairs to take.
"""
