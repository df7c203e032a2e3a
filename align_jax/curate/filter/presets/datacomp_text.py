"""DataComp's text-based filter: English texts with a word of ImageNet-21K's synsets.

Gadre et al. 2023 (2304.14108), baselines `text_based`.
"""

from align_jax.curate.filter import rules

CODE = "Gadre et al. 2023, text_based"

RULES = [
    rules.has_text(),
    rules.language("en", source=f"{CODE}: fastText"),
    rules.text_based(source=CODE),
]
