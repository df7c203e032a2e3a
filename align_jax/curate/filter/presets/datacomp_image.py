"""DataComp's image-based filter: images in clusters of which ImageNet's training set has an image.

Gadre et al. 2023 (2304.14108), baselines `image_based`; its best one is this one together with
`datacomp-clip`: --preset datacomp-image+datacomp-clip.
"""

from align_jax.curate.filter import rules

CODE = "Gadre et al. 2023, image_based"

RULES = [
    rules.has_text(),
    rules.language("en", source=f"{CODE}: fastText"),
    rules.num_words(2, source=f"{CODE}: more than one word between white space", spaced=True),
    rules.num_chars(6, source=f"{CODE}: more than 5 characters"),
    rules.image_based(clusters=100_000, source=CODE),
]
