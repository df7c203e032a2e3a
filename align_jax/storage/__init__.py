"""The doors to the disk: text (what users wrote), problems (what of it could not be used).

Used in this order: text opens and decodes, problems counts what had to be left out.
"""
