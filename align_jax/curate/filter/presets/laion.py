"""LAION-400M's filters: Schuhmann et al. 2021 (2111.02114), section 2.

LAION-2B-en (2210.08402) has the same with a similarity of at least 0.28.
"""

from align_jax.curate.filter import rules

PAPER = "Schuhmann et al. 2021 (LAION-400M), section 2"

RULES = [
    rules.has_text(),
    rules.num_chars(5, source=f"{PAPER}: texts of less than 5 characters go"),
    rules.file_size(at_least_bytes=5000, source=f"{PAPER}: 5 KB, read as 5,000 bytes"),
    rules.similarity(at_least=0.3, source=f"{PAPER}: cosine of CLIP ViT-B/32"),
    rules.language("en", source=f"{PAPER}: cld3"),
    rules.duplicates("url", "text", source=f"{PAPER}: Bloom filter of url and text, here exact"),
]

NOT_COVERED = ("images that CLIP embeddings say are illegal; NSFW ones are only marked",)
