"""What a laptop can evaluate: `align eval --model MODEL --config configs/eval_small.py:ROOT`.

ROOT (default: data) holds public files under these names:

    flickr8k/     dev.jsonl (image, captions; zh and ar, multi30k with de, fr, cs), dev.zip
    cifar10/      test.zip (members class/file), classes.tsv (index, folder, name)
    emoji/        openmoji.jsonl (image, captions: one label), openmoji.zip
    imagenette/   train_subset.zip (members wnid/file), classes.tsv
    text/         cxc_sts_val_subset.tsv, simlex999.tsv, wordsim353.tsv (item, item, score)

With --skip-missing, what is not there is left out. CIFAR-10 and Imagenette serve to learn and to
test: of each class every second image is learned from (part=1/2) and the others are tested. So no
scores of these sets are published; chance levels stand beside each number. The probes take 200
iterations instead of CLIP's 1,000, which would be minutes each.
"""

from ml_collections import ConfigDict

from align_jax.config import default_config


def get_config(root: str = "data") -> ConfigDict:
    """Returns a config of which only eval.evaluators counts."""
    root = root or "data"
    cifar10 = f"{root}/cifar10/test.zip?classes={root}/cifar10/classes.tsv"
    imagenette = f"{root}/imagenette/train_subset.zip?classes={root}/imagenette/classes.tsv"

    def halves(source: str) -> dict[str, str]:
        return {"train": f"{source}&part=1/2", "source": f"{source}&part=2/2"}

    c = default_config()
    c.eval.evaluators = ConfigDict(
        {
            "flickr8k": {
                "type": "retrieval",
                "source": f"{root}/flickr8k/dev.jsonl?images={root}/flickr8k/dev.zip",
            },
            "languages": {
                "type": "multilingual",
                "source": f"{root}/flickr8k/dev.jsonl?lang={{lang}}&images={root}/flickr8k/dev.zip",
                "languages": ("zh", "ar", "de", "fr", "cs"),
            },
            "emoji": {
                "type": "retrieval",
                "source": f"{root}/emoji/openmoji.jsonl?images={root}/emoji/openmoji.zip",
            },
            "cifar10": {"type": "zeroshot", "source": cifar10, "templates": "imagenet80"},
            "imagenette": {"type": "zeroshot", "source": imagenette, "templates": "imagenet80"},
            "cifar10_knn": {"type": "knn", **halves(cifar10)},
            "imagenette_knn": {"type": "knn", **halves(imagenette)},
            "cifar10_probe": {"type": "probe", "iterations": 200, **halves(cifar10)},
            "imagenette_probe": {"type": "probe", "iterations": 200, **halves(imagenette)},
            "cifar10_fewshot": {"type": "fewshot", **halves(cifar10)},
            "imagenette_fewshot": {"type": "fewshot", **halves(imagenette)},
            "sts": {"type": "similarity", "pairs": f"{root}/text/cxc_sts_val_subset.tsv"},
            "simlex": {"type": "words", "pairs": f"{root}/text/simlex999.tsv"},
            "wordsim": {"type": "words", "pairs": f"{root}/text/wordsim353.tsv"},
        }
    )
    return c
