"""Packing pairs for random access: pack is the way in. unit writes one part, finish joins the parts
into a TFDS dataset, key_lists says which pairs to take, joins by what else than their key.
"""
