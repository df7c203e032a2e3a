"""MetaCLIP 2's curation of many languages: Chuang et al. 2025 (2507.22062).

`--metadata` is a folder of entries of each language, en.txt, de.txt, ...; the cap of each leaves
the same share of its matches to the tail, that of MetaCLIP's English pool.
"""

from align_jax.curate.filter import rules

PAPER = "Chuang et al. 2025"
CODE = "MetaCLIP repository, crawl filters"

RULES = [
    rules.has_text(),
    rules.nsfw(
        at_most=0.5, source=f"{CODE}: NSFW, score not named; 0.5 as in the COYO-700M README"
    ),
    rules.duplicates("url", "text", source=f"{CODE}: texts of each url"),
    rules.metaclip(tail=0.055, source=f"{PAPER}; 0.055 is that of MetaCLIP's 400 M English pairs"),
]
