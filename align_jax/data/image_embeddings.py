"""Embeddings of the images of a source, that `align embed` has written: input of a locked tower."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from align_jax.data.images import decode_image
from align_jax.data.sources.open_source import PairSource
from align_jax.storage import identity, text

_SAME = 0.999  # least cosine of an embedding with itself in another dtype


class ImageEmbeddings:
    """Row i is the embedding of record i of a source; read from disk where it is asked for.

    Attributes:
      dim: D.
    """

    def __init__(self, folder: str | os.PathLike, source: PairSource):
        """Opens what `align embed --images SOURCE --out FOLDER` has written.

        Args:
          folder: of shards in format "npy".
          source: whose records they must be of, all of them.

        Raises:
          ValueError: no such folder, or of other images, unfinished, or without some of them.
        """
        self._folder = Path(folder)
        hint = "make it by `align embed --images SOURCE --out FOLDER` from config.data.source"
        try:
            manifest = json.loads(text.read_text(self._folder / "manifest.json"))
            wanted = {
                "kind": "image",
                "file_format": "npy",
                "inputs": f"{len(source)} records {identity.stamp(source)}",
            }
            for key, value in wanted.items():
                if manifest[key] != value:
                    raise ValueError(f"its {key} is {manifest[key]!r}, not {value!r}")
            size, self.dim = manifest["shard_size"], manifest["embed_dim"]
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"config.data.image_embeddings={folder}: {error}; {hint}.") from error
        self._shard_size, self._shards = size, -(-len(source) // size)
        self._open: dict[int, np.ndarray] = {}
        for number in range(self._shards):
            expected = min(size, len(source) - number * size)
            if not self._path(number).is_file() or len(self._shard(number)) != expected:
                raise ValueError(
                    f"config.data.image_embeddings={folder}: shard {number} of {self._shards} does "
                    f"not hold all of its {expected} images; finish `align embed`, and leave out "
                    "of the source what it could not read (`align pack`)."
                )

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns float32 [D]."""
        number, row = divmod(index, self._shard_size)
        return self._shard(number)[row]

    def check(
        self,
        source: PairSource,
        encode: Callable[[list[np.ndarray]], np.ndarray],
        *,
        count: int = 4,
    ) -> None:
        """Raises ValueError if a tower gives other embeddings than these.

        Args:
          source: of the images.
          encode: uint8 images [H, W, 3] -> float32 [N, D], unit norm.
          count: of the images that are compared, over the whole source.
        """
        chosen = sorted({round(i) for i in np.linspace(0, len(source) - 1, count)})
        found = encode([decode_image(source[index].image) for index in chosen])
        own = np.stack([self[index] for index in chosen])
        if own.shape != found.shape:
            raise ValueError(
                f"config.data.image_embeddings={self._folder} have {own.shape[1]} dimensions, "
                f"config.model.embed_dim is {found.shape[1]}."
            )
        cosines = (own * found).sum(1)
        if cosines.min() < _SAME:
            worst = int(cosines.argmin())
            raise ValueError(
                f"config.data.image_embeddings={self._folder}: {source.where(chosen[worst])} has "
                f"cosine {cosines[worst]:.3f} with what the image tower of this run gives; embed "
                "with the model of config.init_from, by whose image tower and projection this run "
                "must start."
            )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}  # workers open the files themselves

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.npy"

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._open:
            self._open[number] = np.load(self._path(number), mmap_mode="r")
        return self._open[number]
