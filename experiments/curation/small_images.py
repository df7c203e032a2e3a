"""ALIGN's rules for thumbnails: the limits that assume full-size images, lowered.

align curate metadata.parquet --preset experiments/curation/small_images.py --out curated

Rare tokens are left out: among 10,000 captions most two-word sequences are unique, so the rule
would drop either nothing or nearly everything.
"""

from align_jax.curate.filter import rules

PAPER = "after Jia et al. 2021, section 3"

RULES = [
    rules.has_text(),
    rules.short_side(at_least_px=100, source=f"{PAPER}; 200 px there"),
    rules.aspect_ratio(below=3, source=PAPER),
    rules.texts_per_image(at_most=1000, source=PAPER),
    rules.images_per_text(at_most=10, source=PAPER),
    rules.num_words(3, 20, source=PAPER),
    rules.duplicates("image_hash", "text", source="COYO-700M README: pHash and text"),
]
