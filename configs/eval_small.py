"""What a laptop can evaluate: `align eval --model MODEL --config configs/eval_small.py:ROOT`.

ROOT (default: data) holds public files under these names: flickr8k/dev.jsonl with dev.zip,
cifar10/test.zip and train.zip, imagenette/train_subset.zip (class folders) with their classes.tsv,
and text/.
With --skip-missing, what is not there is left out. No scores of these small sets are published for
ALIGN; chance levels stand beside each number.
"""

from ml_collections import ConfigDict

from align_jax.config import default_config


def get_config(root: str = "data") -> ConfigDict:
    """Returns a config of which only eval.evaluators counts."""
    root = root or "data"
    cifar10 = f"{root}/cifar10/test.zip?classes={root}/cifar10/classes.tsv"
    train = cifar10.replace("test.zip", "train.zip")
    imagenette = f"{root}/imagenette/train_subset.zip?classes={root}/imagenette/classes.tsv"
    c = default_config()
    c.eval.evaluators = ConfigDict(
        {
            "flickr8k": {
                "type": "retrieval",
                "source": f"{root}/flickr8k/dev.jsonl?images={root}/flickr8k/dev.zip",
            },
            "cifar10": {"type": "zeroshot", "source": cifar10},
            "imagenette": {"type": "zeroshot", "source": imagenette},
            "knn": {"type": "knn", "source": cifar10},
            "knn_imagenette": {"type": "knn", "source": imagenette},
            "probe": {"type": "probe", "train": train, "source": cifar10},
            "fewshot": {"type": "fewshot", "train": train, "source": cifar10},
            "sts": {"type": "similarity", "pairs": f"{root}/text/cxc_sts_val_subset.tsv"},
            "simlex": {"type": "words", "pairs": f"{root}/text/simlex999.tsv"},
            "wordsim": {"type": "words", "pairs": f"{root}/text/wordsim353.tsv"},
        }
    )
    return c
