"""Copies and near-copies of images: decontaminate is the way in. image_sets holds the hashes of a
set, search finds near ones, match_sheet draws what was found.
"""
