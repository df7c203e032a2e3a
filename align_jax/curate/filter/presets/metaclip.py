"""MetaCLIP's balanced curation: Xu et al. 2023 (2309.16671), algorithm 1 and the released code.

Entries are counted after duplicates and NSFW images are gone, as in the code. The cap of 20,000
gave 400 M of 1.6 B texts; a smaller pool needs a smaller cap, in a preset of your own.
"""

from align_jax.curate.filter import rules

PAPER = "Xu et al. 2023, algorithm 1"
CODE = "MetaCLIP repository, crawl filters"

RULES = [
    rules.has_text(),
    rules.language("en", source=CODE),
    rules.nsfw(
        at_most=0.5, source=f"{CODE}: NSFW, score not named; 0.5 as in the COYO-700M README"
    ),
    rules.duplicates("url", "text", source=f"{CODE}: texts of each url"),
    rules.metaclip(cap=20_000, source=PAPER),
]
