"""ALIGN's filters of raw alt-text: Jia et al. 2021 (2102.05918), section 3.

All of them count or measure; none is about a language.
"""

from align_jax.curate.filter import rules

PAPER = "Jia et al. 2021, section 3"
NSFW = f"{PAPER} drops pornographic images, score not named; 0.5 as in the COYO-700M README"

RULES = [
    rules.has_text(),
    rules.nsfw(at_most=0.5, source=NSFW),
    rules.nsfw_tag(source=f"{PAPER} drops pornographic images; the tag is LAION's"),
    rules.short_side(more_than_px=200, source=PAPER),
    rules.aspect_ratio(below=3, source=PAPER),
    rules.texts_per_image(at_most=1000, source=PAPER),
    rules.images_per_text(at_most=10, source=PAPER),
    rules.num_words(3, 20, source=PAPER),
    rules.rare_tokens(top=100_000_000, source=PAPER),
]

NOT_COVERED = ("near-duplicates of the images of evaluation sets (a step of its own)",)
