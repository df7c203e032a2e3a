"""DataComp's CLIP score filter: the highest 30 % by the cosine of CLIP ViT-L/14.

Gadre et al. 2023 (2304.14108), baselines `clip_score_l14_30_percent`.
"""

from align_jax.curate.filter import rules

CODE = "Gadre et al. 2023, clip_score_l14_30_percent"

RULES = [rules.top_share("similarity_l14", 0.3, source=CODE)]
