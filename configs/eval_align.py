"""The paper's evaluations: `align eval --model MODEL --config configs/eval_align.py:ROOT`.

With --skip-missing, what is not below ROOT (default: data) is left out. ROOT holds the data as
their owners publish them:

    flickr30k/  dataset_flickr30k.json (Karpathy), flickr30k-images/
    coco/       dataset_coco.json, val2014/
    cxc/        sts_test.csv, sis_test.csv, sits_test.csv
    eccv/       eccv_image_to_caption.json, eccv_caption_to_image.json
    multi30k/   task1/ and task2/ (the folder `data` of its repository)
    imagenet/   train/ and val/ with a folder a wnid; imagenet-a/, imagenet-r/, imagenet-sketch/
                likewise; imagenetv2/ with folders 0 to 999; objectnet-1.0/images/ and mappings/
    tfds/       VTAB's datasets, prepared with file_format="array_record"
    text/       SimLex-999.txt as SimLex-999.tsv

Published for ALIGN (zero-shot, Jia et al. 2021, tables 1 to 4): Flickr30k 88.6 / 98.7 / 99.7 image
to text and 75.7 / 93.8 / 96.8 text to image; COCO 58.6 / 83.0 / 89.7 and 45.6 / 69.8 / 78.6;
ImageNet 76.4, -R 92.2, -A 75.8, -V2 70.1.
"""

from ml_collections import ConfigDict

from align_jax.config import default_config


def get_config(root: str = "data") -> ConfigDict:
    """Returns a config of which only eval.evaluators counts."""
    root = root or "data"
    coco, imagenet = f"{root}/coco/dataset_coco.json", f"{root}/imagenet"

    def zeroshot(folder: str, names: str = "imagenet") -> dict[str, str]:
        source = f"{imagenet}/{folder}"
        entry = {"type": "zeroshot", "source": source, "class_names": names}
        return entry | {"templates": "imagenet80"}

    c = default_config()
    c.eval.evaluators = ConfigDict(
        {
            "flickr30k": {
                "type": "retrieval",
                "source": f"{root}/flickr30k/dataset_flickr30k.json?"
                f"images={root}/flickr30k/flickr30k-images&split=test",
                "ties": "index",
            },
            "coco": {
                "type": "retrieval",
                "source": f"{coco}?images={root}/coco&split=test",
                "folds": 5,
                "ties": "index",
            },
            "cxc": {
                "type": "cxc",
                "captions": coco,
                "images": f"{root}/coco",
                "annotations": f"{root}/cxc",
            },
            "eccv": {
                "type": "eccv",
                "captions": coco,
                "images": f"{root}/coco",
                "annotations": f"{root}/eccv",
            },
            "multi30k": {
                "type": "multilingual",
                "source": f"{root}/multi30k?lang={{lang}}&images={root}/flickr30k/flickr30k-images",
                "languages": ("en", "de", "fr", "cs"),
                "ties": "index",
            },
            "imagenet": zeroshot("val"),
            "imagenet_a": zeroshot("imagenet-a", "imagenet_a"),
            "imagenet_r": zeroshot("imagenet-r", "imagenet_r"),
            "imagenet_sketch": zeroshot("imagenet-sketch"),
            "imagenet_v2": zeroshot("imagenetv2"),
            "objectnet": {
                "type": "zeroshot",
                "source": f"{imagenet}/objectnet-1.0/images?"
                f"mappings={imagenet}/objectnet-1.0/mappings",
                "templates": "imagenet80",
            },
            "vtab": {"type": "vtab", "data": f"{root}/tfds"},
            "imagenet_knn": {
                "type": "knn",
                "train": f"{imagenet}/train",
                "source": f"{imagenet}/val",
            },
            "simlex": {"type": "words", "pairs": f"{root}/text/SimLex-999.tsv"},
        }
    )
    return c
