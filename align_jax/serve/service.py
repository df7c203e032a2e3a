"""What the endpoints do, less HTTP: admission, decoding, embeddings, classification, search."""

import asyncio
import io
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from align_jax.data import images as images_lib
from align_jax.evals import templates as templates_lib
from align_jax.evals import zeroshot
from align_jax.search.compose import encode_query
from align_jax.search.ingest import Pictures
from align_jax.search.rows import Hit
from align_jax.serve import inputs as inputs_lib
from align_jax.serve.batcher import IMAGE, TEXT, Batcher, Prepared
from align_jax.serve.errors import ApiError, retry_later
from align_jax.serve.inputs import Input
from align_jax.serve.limits import Limits
from align_jax.serve.metrics import Metrics
from align_jax.serve.schemas import NewItem, SearchRequest

_CHUNK = 256  # inputs of one request that are decoded at once
_THUMBNAIL_PX = 512
_THUMBNAILS = 512  # kept

T = TypeVar("T")


class Service:
    """A model and, if there is one, an index of it.

    Attributes:
      model: an `Align`.
      index: an `Index` of this model, or None.
      limits: what is admitted.
      metrics: what is counted.
      warmed: shapes compiled so far, and of how many; (0, 0) before the first.
      is_ready: whether all are.
    """

    def __init__(
        self,
        model: Any,
        index: Any = None,
        *,
        limits: Limits | None = None,
        metrics: Metrics | None = None,
        fetch: Callable[[str], bytes] | None = None,
    ):
        """Starts its threads; `warm_up` makes it ready.

        Args:
          model: an `Align`.
          index: of this model; the caller closes it.
          limits: None takes the defaults.
          metrics: None makes new ones.
          fetch: URL of an image to its content; None refuses URLs.
        """
        self.model = model
        self.index = index
        self.limits = limits or Limits()
        self.metrics = metrics or Metrics()
        self.warmed = (0, 0)
        self.is_ready = False
        self._fetch = fetch
        self._batcher = Batcher(model, self.metrics)
        self._decoders = ThreadPoolExecutor(os.cpu_count() or 1, "decode")
        self._searchers = ThreadPoolExecutor(self.limits.searches, "search")
        self._fetchers = ThreadPoolExecutor(8, "fetch")
        self._writing = threading.Lock()  # Milvus Lite takes one writer at a time
        self._admitted = 0
        self._freed = asyncio.Event()
        self._pictures = Pictures()
        self._reading = threading.Lock()  # of `_pictures` and `_thumbnails`
        self._thumbnails: OrderedDict[str, bytes] = OrderedDict()
        size = model.preprocessing.image_size
        self._most = min(self.limits.queue_items, self.limits.queue_bytes // (size * size * 3))

    def warm_up(self) -> None:
        """Compiles every shape; blocks."""

        def note(done: int, total: int) -> None:
            self.warmed = (done, total)

        self.model.warm_up(note)
        self.is_ready = True

    def close(self) -> None:
        """Ends its threads."""
        for pool in (self._decoders, self._searchers, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)
        self._batcher.close()
        self.metrics.close()

    async def embed(self, inputs: Sequence[Input]) -> tuple[np.ndarray, list[int]]:
        """Returns z, float32 [N, D], in the order of the inputs, and the tokens of each.

        Raises:
          ApiError: 400, an input cannot be used (the first of them is named); 429, there is no room
            in the queue.
        """
        parts, tokens = [], []
        for start in range(0, len(inputs), _CHUNK):
            chunk = inputs[start : start + _CHUNK]
            await self._admit(len(chunk), may_wait=start > 0)
            try:
                prepared, counts = await self._prepare(chunk)
                parts.append(await asyncio.wrap_future(self._batcher.submit(prepared)))
                tokens += counts
            finally:
                self._release(len(chunk))
        return np.concatenate(parts), tokens

    async def classify(
        self, images: Sequence[Input], labels: Sequence[str], templates: Sequence[str] | None
    ) -> np.ndarray:
        """Returns what `Align.classify` does, float32 [N, C]."""
        templates = _valid(templates_lib.load_templates, tuple(templates or templates_lib.SIMPLE))
        if len(labels) * len(templates) > 10_000:
            raise ApiError(400, "labels x templates exceed 10,000 prompts.", param="templates")
        labels = [inputs_lib.text_of(_label(n, one), 1000) for n, one in enumerate(labels)]
        prompts = [template.replace("{}", label) for label in labels for template in templates]
        z_image, _ = await self.embed(images)
        z_prompt, _ = await self.embed([Input(TEXT, prompt, "labels") for prompt in prompts])
        z_text = _valid(zeroshot.class_vectors, lambda _: z_prompt, labels, templates)
        logits = self.model.similarity(z_image, z_text)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    async def search(self, request: SearchRequest) -> tuple[list[Hit], dict[str, float]]:
        """Returns the hits and the milliseconds of each stage."""
        start = time.monotonic()
        vector = await self._query(request)
        encoded = time.monotonic()
        where = dict(request.filter or {})
        if request.kind != "any":
            if "kind" in where:
                raise ApiError(400, "filter: kind is a field of the request.", param="filter.kind")
            where["kind"] = request.kind
        most = request.offset + request.k

        def find() -> list[Hit]:
            (hits,) = self.index.search(vector[None], k=most, filter=where)
            return hits[request.offset :]

        hits = await self.search_thread(find, param="filter")
        found = time.monotonic()
        self.metrics.stage_seconds.labels("search").observe(found - encoded)
        took = {"encode": encoded - start, "search": found - encoded}
        return hits, {name: round(1000 * seconds, 1) for name, seconds in took.items()}

    async def add(self, items: Sequence[NewItem]) -> dict[str, int]:
        """Stores rows; returns how many were added, updated and unchanged."""
        named = []
        for number, item in enumerate(items):
            name = f"items[{number}]"
            if (item.image is None) == (item.text is None):
                raise ApiError(400, f"{name}: give either image or text.", param=name)
            if item.text is None:
                named.append(Input(IMAGE, item.image, f"{name}.image"))
            else:
                named.append(Input(TEXT, item.text, f"{name}.text"))
        z, _ = await self.embed(named)
        counts = {"added": 0, "updated": 0, "unchanged": 0}

        def store() -> None:
            with self._writing:
                for tower in (IMAGE, TEXT):
                    rows = [i for i, one in enumerate(named) if one.tower == tower]
                    if not rows:
                        continue
                    done = self.index.add(
                        [items[i].key for i in rows],
                        z[rows],
                        kind=tower,
                        captions=[items[i].caption or items[i].text or "" for i in rows],
                        metadata=[items[i].meta for i in rows],
                    )
                    for name, count in done.items():
                        counts[name] += count

        if len({item.key for item in items}) != len(items):
            raise ApiError(400, "items: a key comes twice.", param="items")
        await self.search_thread(store, param="items")
        return counts

    async def delete(self, keys: Sequence[str]) -> int:
        """Deletes rows; returns how many there were."""

        def remove() -> int:
            with self._writing:
                return self.index.delete(keys)

        return await self.search_thread(remove, param="keys")

    async def thumbnail(self, key: str) -> bytes:
        """Returns the picture of a row as a JPEG of at most 512 px.

        Raises:
          ApiError: 404; there is no such row, or its picture cannot be read any more.
        """
        no_picture = ApiError(404, "There is no picture of this key.", code="not_found")
        rows = await self.search_thread(lambda: self.index.get([key]), param=None)
        if key not in rows or rows[key].kind != IMAGE or not rows[key].source:
            raise no_picture
        row = rows[key]

        def draw() -> bytes:
            with self._reading:
                kept = self._thumbnails.get(row.digest)
                if kept is None:
                    picture = Image.fromarray(self._pictures.read(key, row.source))
                    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
                    file = io.BytesIO()
                    picture.save(file, "JPEG", quality=85)
                    kept = self._thumbnails[row.digest] = file.getvalue()
                self._thumbnails.move_to_end(row.digest)
                while len(self._thumbnails) > _THUMBNAILS:
                    self._thumbnails.popitem(last=False)
                return kept

        try:
            return await asyncio.get_running_loop().run_in_executor(self._decoders, draw)
        except (ValueError, OSError):
            raise no_picture from None

    async def search_thread(self, work: Callable[[], T], *, param: str | None) -> T:
        """Returns what `work` does, in one of the threads that use the index."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._searchers, work)
        except ValueError as error:
            raise ApiError(400, str(error), param=param, code="invalid_value") from None

    async def _query(self, request: SearchRequest) -> np.ndarray:
        """Returns the vector to search by, float32 [D]."""
        if request.vector is not None:
            given = (request.image, request.text, request.add, request.remove, request.weight)
            if any(one is not None and one != [] for one in given):
                raise ApiError(400, "vector stands alone.", param="vector")
            vector = np.asarray(request.vector, np.float32)
            dim = self.model.model.embed_dim
            norm = float(np.linalg.norm(vector.astype(np.float64)))
            if len(vector) != dim or not abs(norm - 1) <= 1e-3:
                message = f"vector has {len(vector)} numbers and norm {norm:.4g}, not {dim} and 1."
                raise ApiError(400, message, param="vector", code="invalid_value")
            return vector
        if request.image is None and request.text is None:
            raise ApiError(400, "Give image, text, both, or vector.", param="text")
        texts = [("text", request.text)] if request.text is not None else []
        texts += [(f"add[{number}]", text) for number, text in enumerate(request.add)]
        texts += [(f"remove[{number}]", text) for number, text in enumerate(request.remove)]
        named = [Input(TEXT, text, name) for name, text in texts]
        if request.image is not None:
            named.append(Input(IMAGE, request.image, "image"))
        z, _ = await self.embed(named)
        return _valid(
            encode_query,
            _Encoded(z[len(texts) :], z[: len(texts)]),
            image=request.image,
            text=request.text,
            add=request.add,
            remove=request.remove,
            weight=request.weight,
        )

    async def _prepare(self, inputs: Sequence[Input]) -> tuple[list[Prepared], list[int]]:
        """Returns inputs for the device, and how many tokens each has."""
        start, loop = time.monotonic(), asyncio.get_running_loop()
        text_rows = [row for row, one in enumerate(inputs) if one.tower == TEXT]
        calls = [self._image(one) for one in inputs if one.tower == IMAGE]
        if text_rows:
            texts = [inputs_lib.text_of(inputs[row], self.limits.text_chars) for row in text_rows]
            calls.append(loop.run_in_executor(self._decoders, self._tokenize, texts))
        done = await asyncio.gather(*calls, return_exceptions=True)
        for one in done:  # in the order of the inputs: the first is named
            if isinstance(one, BaseException):
                raise one
        tokenized = iter(done.pop() if text_rows else ())
        views = iter(done)
        prepared = [next(views if one.tower == IMAGE else tokenized) for one in inputs]
        self.metrics.stage_seconds.labels("decode").observe(time.monotonic() - start)
        return prepared, [int(one.arrays[1].sum()) if one.tower == TEXT else 0 for one in prepared]

    async def _image(self, given: Input) -> Prepared:
        loop, data = asyncio.get_running_loop(), None
        if (url := inputs_lib.url_of(given)) is not None:
            if self._fetch is None:
                message = (
                    f"{given.param} is a URL, which this server does not fetch; send the image."
                )
                raise ApiError(400, message, param=given.param, code="url_fetch_disabled")
            try:
                data = await loop.run_in_executor(self._fetchers, self._fetch, url)
            except (ValueError, OSError) as error:
                message = f"{given.param} cannot be fetched: {error}."
                raise ApiError(400, message, param=given.param, code="url_refused") from None
        return await loop.run_in_executor(self._decoders, self._decode, given, data)

    def _decode(self, given: Input, data: bytes | None) -> Prepared:
        p, limits = self.model.preprocessing, self.limits
        if data is None:
            data = inputs_lib.image_bytes(given, limits.image_bytes)
        try:
            picture = images_lib.load_rgb(data, limits.image_pixels)
        except images_lib.BadImage as error:
            message = f"{given.param} cannot be used: {error}"
            code = "image_too_large" if error.reason == "image_too_large" else "invalid_image"
            raise ApiError(400, message, param=given.param, code=code) from None
        view = images_lib.eval_view(
            picture, resize_px=p.resize_size, crop_px=p.image_size, method=p.resize
        )
        return Prepared(IMAGE, (view,))

    def _tokenize(self, texts: list[str]) -> list[Prepared]:
        ids, mask = self.model.tokenizer.encode(texts, self.model.preprocessing.max_tokens)
        return [Prepared(TEXT, pair) for pair in zip(ids, mask, strict=True)]

    async def _admit(self, count: int, *, may_wait: bool) -> None:
        while self._admitted and self._admitted + count > self._most:
            if not may_wait:
                self.metrics.rejected.labels("queue_full").inc()
                raise retry_later(429, "The queue is full; come again.", "queue_full")
            self._freed.clear()
            await self._freed.wait()
        self._admitted += count
        self.metrics.queue_items.set(self._admitted)

    def _release(self, count: int) -> None:
        self._admitted -= count
        self.metrics.queue_items.set(self._admitted)
        self._freed.set()


class _Encoded:
    """Stands for a model whose embeddings are there already."""

    def __init__(self, z_image: np.ndarray, z_text: np.ndarray):
        self._z_image, self._z_text = z_image, z_text

    def encode_image(self, images: Sequence[Any]) -> np.ndarray:
        return self._z_image

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        return self._z_text


def _label(number: int, text: str) -> Input:
    return Input(TEXT, text, f"labels[{number}]")


def _valid(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """Calls it; its ValueError is the client's."""
    try:
        return function(*args, **options)
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_value") from None
