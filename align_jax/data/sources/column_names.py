"""Names that columns have in the tables of known datasets, one list for every verb.

Known are COYO-700M, LAION (400M, 2B, -joined, aesthetic), DataComp, img2dataset, CC3M, CC12M,
Flickr, COCO, the tables of `align scan` and `align pack`. Names are matched without regard to case.
"""

from collections.abc import Iterable, Sequence

IMAGE_COLUMNS = (
    "image",
    "file_name",
    "filename",
    "file",
    "filepath",
    "image_path",
    "image_name",
    "image_file",
    "path",
    "key",
)
CAPTION_COLUMNS = (
    "captions",
    "caption",
    "text",
    "texts",
    "txt",
    "sentences",
    "sentence",
    "comment",
    "title",
    "alt_text",
)
# What a column is -> its names; the first one that is there is used.
COLUMN_NAMES = {
    "key": (*IMAGE_COLUMNS, "uid", "sample_id", "id"),
    "url": ("url", "image_url"),
    "text": CAPTION_COLUMNS,
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
    "file_bytes": ("file_bytes", "file_size"),
    "image_hash": ("image_hash", "image_phash", "phash", "imagehash", "sha256", "md5"),
    "nsfw": ("nsfw_score_opennsfw2", "nsfw_score_gantman", "punsafe", "nsfw"),
    "nsfw_tag": ("nsfw_tag", "nsfw"),
    "watermark": ("watermark_score", "pwatermark", "watermark"),
    "aesthetic": ("aesthetic_score_laion_v2", "aesthetic_score", "aesthetic"),
    "similarity": ("clip_similarity_vitb32", "clip_b32_similarity_score", "similarity"),
    "similarity_l14": ("clip_similarity_vitl14", "clip_l14_similarity_score", "similarity_l14"),
    "language": ("language", "lang"),
}


def find_column(names: Iterable[str], known: Sequence[str]) -> str | None:
    """Returns the name of the column that is the first of `known`, None if there is none."""
    return next(iter(find_columns(names, known)), None)


def find_columns(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """Returns the names of the columns that are one of `known`, in the order of `known`."""
    by_lower = {name.strip().lower(): name for name in reversed(list(names))}
    return [by_lower[name] for name in known if name in by_lower]
