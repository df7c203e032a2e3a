"""The doors to the disk: text (what users wrote), problems (what of it could not be used),
identity (what a thing was made from), writing (files, locks).

Used in this order: text opens and decodes, problems counts what had to be left out, identity stamps
what was read, writing puts results on the disk.
"""
