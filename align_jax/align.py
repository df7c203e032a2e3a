"""`Align`: a trained model with its tokenizer and preprocessing, as one object; `load` makes it."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from align_jax import __version__, encode
from align_jax import mesh as mesh_lib
from align_jax.data.tokenizer import Tokenizer
from align_jax.evals import templates as templates_lib
from align_jax.evals import zeroshot
from align_jax.hf import adapter as adapter_lib
from align_jax.hf import config as hf_config
from align_jax.hf import convert, hub, model_card, processor
from align_jax.hf import weights as weights_file
from align_jax.models import dual_encoder
from align_jax.run import trained
from align_jax.storage import writing


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where weights come from.

    Attributes:
      name: of the folder, or the hub id.
      step: of the checkpoint, if a workdir of ours.
      config: of the run, likewise.
      path: what `load` takes to load them again: an absolute path or the hub id.
    """

    name: str
    step: int | None = None
    config: ConfigDict | None = None
    path: str = ""


class Align:
    """Encodes images and texts to float32 embeddings [N, D] of unit norm.

    Args:
      model: the dual encoder.
      variables: {"params", "batch_stats"}; may be replaced by later ones of the same run.
      tokenizer: that the model was trained with.
      preprocessing: likewise.
      mesh: over which batches are split.
      batch_size: most examples per call of the compiled model, rounded up to a multiple of the
        devices.
      origin: for the model card and reports; None where the model is still being trained.
      hf_extras: tensors of a Hugging Face checkpoint that the model does not use, for `save`.
      show_progress: whether long inputs get a progress bar, if stderr is a terminal.
    """

    def __init__(
        self,
        model: dual_encoder.DualEncoder,
        variables: dual_encoder.Variables,
        tokenizer: Tokenizer,
        preprocessing: processor.Preprocessing,
        mesh: Mesh,
        *,
        batch_size: int,
        origin: Origin | None = None,
        hf_extras: Mapping[str, np.ndarray] | None = None,
        show_progress: bool = False,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        self.model = model
        self.variables = variables
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing
        self.origin = origin
        self.hf_extras = dict(hf_extras or {})
        self._rows = mesh_lib.batch_sharding(mesh)
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._show_progress = show_progress
        shardings = jax.tree.map(lambda leaf: leaf.sharding, variables)
        self._embed_image, self._embed_text = encode.compile_embed(model, shardings, mesh)
        self._embed_cls = encode.compile_embed_cls(model, shardings, mesh)

    @property
    def temperature(self) -> float:
        """The learned scalar that divides the cosine."""
        return float(self.variables["params"]["temperature"])

    def encode_image(self, images: Iterable, *, on_error: str = "raise") -> np.ndarray:
        """Returns z_image [N, D] float32, unit norm; row i is image i.

        Images are decoded by several threads while the device computes. EXIF orientation is
        honoured and everything becomes RGB, see `data/images.decode_image`.

        Args:
          images: any number of paths, encoded bytes, Pillow images, uint8 arrays ([H, W],
            [H, W, 3] or RGBA), or functions of no arguments that return one of these, called in
            the decoding threads. May be a generator, or one array [N, H, W, 3].
          on_error: what happens to an image that cannot be read or decoded: "raise", or "skip",
            which logs a warning that names it and makes its row NaN.

        Raises:
          images.BadImage: (a ValueError) one of them cannot be decoded; the message names it.
          OSError: one of them cannot be read.
          ValueError: nothing to encode, or one image instead of a list of them.

        Example:
          >>> z_image = model.encode_image(["red.png", "blue.png"])
          >>> z_image.shape, z_image.dtype.name
          ((2, 80), 'float32')
          >>> np.linalg.norm(z_image, axis=1).round(3).tolist()
          [1.0, 1.0]
        """
        if on_error not in encode.ON_ERROR:
            raise ValueError(f"on_error={on_error!r} is unknown; use 'raise' or 'skip'.")
        if isinstance(images, np.ndarray) and images.ndim != 4:
            raise ValueError(f"images is one array {list(images.shape)}; put it in a list.")
        if not isinstance(images, Iterable) or isinstance(images, str | bytes):
            raise ValueError(f"images is one {type(images).__name__}; put it in a list.")
        batches = encode.image_batches(
            images,
            self.preprocessing,
            sharding=self._rows,
            batch_size=self._batch_size,
            on_error=on_error,
        )
        return self._encode(self._embed_image, batches, images, "images")

    def encode_text(self, texts: Iterable[str], *, projected: bool = True) -> np.ndarray:
        """Returns z_text [N, D] float32, unit norm, of texts cut to the model's number of tokens.

        Args:
          texts: any number of them.
          projected: False gives the state of [CLS] before the projection instead, [N, W] of unit
            norm with the width of the text tower, which has no place among images.

        Raises:
          ValueError: nothing to encode, one text instead of a list of them, or no strings.

        Example:
          >>> model.encode_text(["a red square", "a blue one"]).shape
          (2, 80)
        """
        if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
            raise ValueError(f"texts is one {type(texts).__name__}; put it in a list.")
        batches = encode.text_batches(
            texts,
            self.tokenizer,
            max_tokens=self.preprocessing.max_tokens,
            batch_size=self._batch_size,
        )
        embed = self._embed_text if projected else self._embed_cls
        return self._encode(embed, batches, texts, "texts")

    def encode_views(self, views: np.ndarray) -> np.ndarray:
        """Returns z_image [N, D] of pictures that are cut already, uint8 [N, S, S, 3].

        For programs that decode in threads of their own; S is `preprocessing.image_size`, and
        `data/images.eval_view` does the cutting.
        """
        return self._encode_ready(self._embed_image, views)

    def encode_tokens(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Returns z_text [N, D] of what `tokenizer.encode` has made, int32 [N, max_tokens]."""
        return self._encode_ready(self._embed_text, *encode.trim(ids, mask))

    @property
    def batch_sizes(self) -> list[int]:
        """Every number of rows that is compiled, ascending: shorter batches are padded to one."""
        return encode.batch_sizes(self._rows.num_devices, self._batch_size)

    def warm_up(self, after_each: Callable[[int, int], None] | None = None) -> int:
        """Compiles every shape that encoding can need, so that no later call waits for it.

        Args:
          after_each: is told how many shapes are done, and of how many.

        Returns:
          The number of shapes.

        Example:
          >>> model.warm_up() > 0
          True
        """
        size, max_tokens = self.preprocessing.image_size, self.preprocessing.max_tokens
        calls: list[Callable[[], np.ndarray]] = []
        for rows in reversed(self.batch_sizes):
            views = np.zeros((rows, size, size, 3), np.uint8)
            calls.append(partial(self.encode_views, views))
            for length in encode.text_lengths(max_tokens):
                ids = np.full((rows, max_tokens), self.tokenizer.pad_id, np.int32)
                mask = (np.arange(max_tokens) < length).astype(np.int32)
                calls.append(partial(self.encode_tokens, ids, np.tile(mask, (rows, 1))))
        for done, call in enumerate(calls, start=1):
            call()
            if after_each is not None:
                after_each(done, len(calls))
        return len(calls)

    def similarity(self, z_image: np.ndarray, z_text: np.ndarray) -> np.ndarray:
        """Returns logits [N_image, N_text] float32: cosines divided by the temperature.

        Args:
          z_image: [N_image, D], unit norm.
          z_text: [N_text, D], unit norm.

        Example:
          >>> z_image = model.encode_image(["red.png"])
          >>> logits = model.similarity(z_image, model.encode_text(["red", "blue", "green"]))
          >>> logits.shape, bool(abs(logits).max() <= 1 / model.temperature)
          ((1, 3), True)
        """
        return z_image @ z_text.T / np.float32(self.temperature)

    def classify(
        self,
        images: Iterable,
        labels: Sequence[str],
        templates: str | Sequence[str] = templates_lib.SIMPLE,
        *,
        on_error: str = "raise",
    ) -> np.ndarray:
        """Returns probabilities [N, C] float32; each row sums to 1.

        Args:
          images: see `encode_image`.
          labels: C candidate labels, put where a template has `{}`.
          templates: prompts whose embeddings are averaged, see `evals/templates.load_templates`.
          on_error: see `encode_image`.

        Raises:
          ValueError: no label, a template without `{}`, or see `encode_image`.

        Example:
          >>> probs = model.classify(["red.png", "blue.png"], ["red", "blue", "green"])
          >>> probs.shape, probs.sum(axis=1).round(3).tolist()
          ((2, 3), [1.0, 1.0])
        """
        if isinstance(labels, str):
            raise ValueError("labels is one str; put it in a list.")
        templates = templates_lib.load_templates(templates)
        z_text = zeroshot.class_vectors(self.encode_text, list(labels), templates)
        logits = self.similarity(self.encode_image(images, on_error=on_error), z_text)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes a folder that `load` and transformers' AlignModel and AlignProcessor read.

        The kernels of a model with an adapter are written as adapted.

        It holds model.safetensors (float32), config.json, the tokenizer, the preprocessing (files
        of transformers 4 and 5) and README.md, a model card.

        Raises:
          ValueError: the folder is a file, a workdir or holds another README.md, or the model has
            an image projection, which the format has no place for, that cannot be folded into the
            layer before.

        Example:
          >>> model.save("copy")
          >>> align_jax.load("copy").fingerprint() == model.fingerprint()
          True
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; name a folder.")
        if (folder / "config.json").exists() and not hub.is_hugging_face(folder):
            raise ValueError(f"{folder} is a workdir; name another folder.")
        if (folder / "README.md").exists() and not hub.is_hugging_face(folder):
            raise ValueError(f"{folder} holds a README.md of no model; name another folder.")
        p = self.preprocessing
        variables = dual_encoder.merge_lora(self.model, jax.device_get(self.variables))
        config = hf_config.hf_from_model(
            self.model, image_size=p.image_size, pad_token_id=self.tokenizer.pad_id
        )
        tensors = convert.to_hf(variables, self.model, self.hf_extras)
        folder.mkdir(parents=True, exist_ok=True)
        weights_file.write_safetensors(folder / "model.safetensors", tensors)
        processor.write_processor(folder, self.tokenizer, p)
        origin = self.origin or Origin(folder.resolve().name)
        card = model_card.make_card(
            self.model,
            variables,
            p,
            name=origin.name,
            step=origin.step,
            config=origin.config,
            version=__version__,
        )
        writing.write_text(folder / "config.json", config.to_json_string())
        writing.write_text(folder / "README.md", card)

    def save_adapter(self, folder: str | os.PathLike) -> None:
        """Writes A and B of a model that has an adapter, in PEFT's format.

        `load(base, adapter=folder)` and `peft.PeftModel.from_pretrained(AlignModel, folder)` read
        the folder.

        Raises:
          ValueError: the model has no adapter, or see `hf/adapter.write_adapter`.
        """
        config = self.origin.config if self.origin else None
        base = config.init_from if config else ""
        variables = jax.device_get(self.variables)
        adapter_lib.write_adapter(folder, self.model, variables, base=base)

    def fingerprint(self) -> str:
        """Returns 16 hex digits that identify weights, compute dtype, tokenizer, preprocessing."""
        variables = self.variables
        if self.model.lora:  # the merged model, as it is saved, has the same
            variables = dual_encoder.merge_lora(self.model, jax.device_get(variables))
        return encode.fingerprint(self.model, variables, self.preprocessing)

    def _encode_ready(self, embed: Callable[..., jax.Array], *arrays: np.ndarray) -> np.ndarray:
        return encode.encode(
            partial(embed, self.variables),
            encode.one_batch(*arrays, batch_size=self._batch_size),
            sharding=self._rows,
            batch_size=self._batch_size,
            progress=encode.progress_bar(arrays[0], "rows", enabled=False),
        )

    def _encode(
        self,
        embed: Callable[..., jax.Array],
        batches: encode.Batches,
        inputs: Iterable,
        unit: str,
    ) -> np.ndarray:
        return encode.encode(
            partial(embed, self.variables),
            batches,
            sharding=self._rows,
            batch_size=self._batch_size,
            progress=encode.progress_bar(inputs, unit, enabled=self._show_progress),
        )


def load(
    name_or_path: str | os.PathLike,
    *,
    dtype: str | None = None,
    batch_size: int | None = None,
    step: int | None = None,
    adapter: str | os.PathLike | None = None,
) -> Align:
    """Returns a trained model from a workdir, a Hugging Face folder or the Hugging Face hub.

    Args:
      name_or_path: a workdir of `align train`, a folder in the format of transformers' AlignModel,
        or a hub id such as "kakaobrain/align-base".
      dtype: of convolutions and matmuls, "float32" or "bfloat16"; None takes that of the run, and
        float32 for Hugging Face weights. Norms, pooling, projections stay float32.
      batch_size: most examples per call of the compiled model; None takes config.eval.batch_size
        of the run, and 64 for Hugging Face weights.
      step: of a workdir's checkpoint; None takes the newest.
      adapter: folder of a LoRA adapter to it in PEFT's format.

    Raises:
      ValueError: nothing of that name, files that are missing, damaged or do not belong together,
        an adapter of another model, or no network to download from.

    Example:
      >>> model = align_jax.load("tiny", batch_size=8)
      >>> model.temperature
      0.5
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r} is unknown; use 'float32' or 'bfloat16'.")
    base = _load_base(name_or_path, dtype, batch_size, step)
    return base if adapter is None else _adapt(base, adapter)


def _adapt(base: Align, folder: str | os.PathLike) -> Align:
    """Returns the model with an adapter, instead of the one that it may have."""
    plain = dual_encoder.merge_lora(base.model, jax.device_get(base.variables))
    model = dataclasses.replace(base.model, lora=None)
    lora, params = adapter_lib.read_adapter(folder, model, plain)
    variables = plain | {"params": params}
    mesh = base._rows.mesh
    origin = Origin(f"{base.origin.name}+{Path(folder).resolve().name}")
    return Align(
        dataclasses.replace(model, lora=lora),
        jax.device_put(variables, mesh_lib.infer_shardings(variables, mesh)),
        base.tokenizer,
        base.preprocessing,
        mesh,
        batch_size=base._batch_size,
        origin=origin,
        hf_extras=base.hf_extras,
        show_progress=True,
    )


def _load_base(
    name_or_path: str | os.PathLike, dtype: str | None, batch_size: int | None, step: int | None
) -> Align:
    folder = hub.find_folder(name_or_path)
    is_local = Path(name_or_path).is_dir()
    name = folder.resolve().name if is_local else str(name_or_path)
    path = str(folder.resolve()) if is_local else name
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is no model: config.json is missing; name a workdir of `align train` or a "
            "Hugging Face folder."
        )
    if not hub.is_hugging_face(folder):
        return _load_workdir(folder, name, path, dtype, batch_size, step)
    if step is not None:
        raise ValueError(f"{name_or_path} is no workdir, so it has no step {step}.")
    tokenizer, preprocessing = processor.read_processor(folder)
    loaded = convert.load_folder(folder, dtype=dtype or "float32")
    model = loaded.model
    if tokenizer.vocab_size > model.text.vocab_size:
        raise ValueError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, its model only "
            f"{model.text.vocab_size}; they do not belong together."
        )
    max_tokens = min(preprocessing.max_tokens, model.text.max_positions)
    mesh = mesh_lib.make_mesh()
    return Align(
        model,
        jax.device_put(loaded.variables, mesh_lib.infer_shardings(loaded.variables, mesh)),
        tokenizer,
        dataclasses.replace(preprocessing, max_tokens=max_tokens),
        mesh,
        batch_size=64 if batch_size is None else batch_size,
        origin=Origin(name, path=path),
        hf_extras=loaded.extras,
        show_progress=True,
    )


def _load_workdir(
    folder: Path,
    name: str,
    path: str,
    dtype: str | None,
    batch_size: int | None,
    step: int | None,
) -> Align:
    if trained.is_classifier(folder):
        raise ValueError(
            f"{folder} is a classifier, whose images and texts share no space; it works with "
            "`align eval` and as config.init_from."
        )
    found = trained.load_trained(folder, dtype=dtype, step=step)
    return Align(
        found.model,
        found.variables,
        found.tokenizer,
        found.preprocessing,
        found.mesh,
        batch_size=found.config.eval.batch_size if batch_size is None else batch_size,
        origin=Origin(name, found.step, found.config, path),
        show_progress=True,
    )
