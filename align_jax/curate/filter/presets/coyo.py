"""COYO-700M's filters: README of kakaobrain/coyo-dataset, "Data filtering".

The release itself does not keep all of its limits (its longest text has 323 words).
"""

from align_jax.curate.filter import rules

README = "COYO-700M README"
SPACES = "after white space is collapsed and trimmed"

RULES = [
    rules.has_text(),
    rules.file_size(at_least_bytes=5000, source=f"{README}: 5 KB, read as 5,000 bytes"),
    rules.aspect_ratio(at_most=3, source=README),
    rules.short_side(at_least_px=200, source=README),
    rules.nsfw(at_most=0.5, source=f"{README}: OpenNSFW2 or GantMan above 0.5 goes"),
    rules.language("en", source=f"{README}: cld3"),
    rules.num_chars(6, 1000, source=f"{README}: 5 characters or less go, more than 1000 go"),
    rules.num_words(3, 256, source=f"{README}: words separated by spaces", spaced=True),
    rules.repeated_text(at_most=10, source=f"{README}, {SPACES}", collapse=True),
    rules.duplicates(
        "image_hash", "text", source=f"{README}: pHash and text, {SPACES}", collapse=True
    ),
]

NOT_COVERED = (
    "texts without a noun (needs a part-of-speech tagger)",
    "texts with words of three profanity lists",
    "pHash duplicates of ImageNet-1K/21K, Flickr30K, MS-COCO, CC3M, CC12M (a step of its own)",
)
