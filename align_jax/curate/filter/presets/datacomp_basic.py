"""DataComp's basic filter: Gadre et al. 2023 (2304.14108), baselines of the datacomp repository."""

from align_jax.curate.filter import rules

CODE = "Gadre et al. 2023, basic filter"

RULES = [
    rules.has_text(),
    rules.language("en", source=f"{CODE}: fastText"),
    rules.num_words(3, source=f"{CODE}: more than 2 words between white space", spaced=True),
    rules.num_chars(6, source=f"{CODE}: more than 5 characters"),
    rules.aspect_ratio(at_most=3, source=CODE),
    rules.short_side(at_least_px=200, source=CODE),
]
