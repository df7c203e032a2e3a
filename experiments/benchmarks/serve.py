"""Load on `align serve` beside a torch server that does the same: items/s, latency, CPU, memory.

Run: python experiments/benchmarks/serve.py --size tiny --seconds 10 --out serve.json

Both serve the same random weights, one after the other takes each load while the other is idle.
The torch server is a minimal one of our own (Starlette, transformers, the same batching in a
thread of its own, base64 both ways): it stands for what people write today, not for a product.
Sizes: `tiny`, and `base`, the size of kakaobrain/align-base. Images are 256 x 256 JPEGs as data
URIs, texts have 4 to 24 words; each request has one. Needs the extras serve and test.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CAPTIONS = ["a photo of a cat", "a photo of a dog", "two red squares and circles on a mat"] * 3


def main() -> None:
    """Prints a table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("tiny", "base"), default="tiny")
    parser.add_argument("--seconds", type=float, default=10, help="of each load")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--batch-size", type=int, default=32, help="most a device call")
    parser.add_argument("--folder", help="keeps the model and compiled programs for another run")
    parser.add_argument("--out", help="JSON")
    parser.add_argument("--peer", help=argparse.SUPPRESS)  # this process is the torch server
    args = parser.parse_args()
    if args.peer:
        serve_with_torch(args.peer, args.batch_size)
        return
    folder = Path(args.folder or tempfile.mkdtemp(prefix="align-serve-"))
    if not (folder / "model" / "config.json").exists():
        make_model(folder / "model", args.size)
    model, size = str(folder / "model"), str(args.batch_size)
    env = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "PYTHONUNBUFFERED": "1",
    }
    ours = [sys.executable, "-m", "align_jax.cli.main", "serve", "--model", model, "--port", "0"]
    torch = [sys.executable, __file__, "--peer", model, "--batch-size", size]
    commands = {"align serve": [*ours, "--batch-size", size], "torch": torch}
    running = {}
    try:
        for name, command in commands.items():
            start = time.monotonic()
            running[name] = Server(command, env)
            print(f"{name}: ready after {time.monotonic() - start:.1f} s", flush=True)
        results = []
        for kind in ("text", "image"):
            bodies = [json.dumps({"input": one, "encoding_format": "base64"}).encode()
                      for one in make_inputs(kind)]  # fmt: skip
            check_equal(running, bodies[:4])
            for connections in args.connections:
                for name, server in running.items():
                    asyncio.run(load(server.port, bodies, connections, args.seconds / 4))
                    cpu = server.cpu_seconds()
                    seconds, took = asyncio.run(
                        load(server.port, bodies, connections, args.seconds)
                    )
                    row = {
                        "server": name,
                        "kind": kind,
                        "connections": connections,
                        "items_per_s": round(len(took) / seconds, 1),
                        "p50_ms": round(1000 * float(np.percentile(took, 50)), 1),
                        "p99_ms": round(1000 * float(np.percentile(took, 99)), 1),
                        "cpu_ms_an_item": round(1000 * (server.cpu_seconds() - cpu) / len(took), 1),
                        "rss_mb": server.memory_mb(),
                    }
                    results.append(row)
                    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    finally:
        for server in running.values():
            server.process.kill()
            server.process.wait()
    if args.out:
        report = {"size": args.size, "batch_size": args.batch_size, "cores": os.cpu_count()}
        report |= {"load_average": os.getloadavg()[0], "results": results}
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n")


class Server:
    """A server process that has said where it is, and that it is ready."""

    def __init__(self, command: Sequence[str], env: dict[str, str]):
        """Waits for both lines."""
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        self.port = 0
        for line in self.process.stdout:
            if match := re.search(r"http://\S+:(\d+)", line):
                self.port = int(match[1])
            if line.startswith("ready"):
                return
        raise RuntimeError(f"{command[0]} ended with {self.process.wait()}.")

    def cpu_seconds(self) -> float:
        """Returns the CPU time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> int:
        """Returns its resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") // 1_000_000


async def load(
    port: int, bodies: Sequence[bytes], connections: int, seconds: float
) -> tuple[float, list[float]]:
    """Returns the seconds in all, and of each request; every connection asks without a pause."""
    took: list[float] = []
    start = time.monotonic()

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() - start < seconds:
            number += 1
            asked = time.monotonic()
            await exchange(reader, writer, bodies[number % len(bodies)])
            took.append(time.monotonic() - asked)
        writer.close()

    await asyncio.gather(*(client(7 * number) for number in range(connections)))
    return time.monotonic() - start, took


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes
) -> bytes:
    """Sends one request and returns the body of the answer."""
    head = (
        "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    header = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(re.search(rb"content-length: (\d+)", header)[1])
    answer = await reader.readexactly(length)
    if b" 200 " not in header.split(b"\r\n")[0]:
        raise RuntimeError(answer.decode())
    return answer


def check_equal(running: dict[str, Server], bodies: Sequence[bytes]) -> None:
    """Raises RuntimeError unless both give the same embeddings."""

    async def ask(port: int) -> np.ndarray:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        rows = [json.loads(await exchange(reader, writer, body)) for body in bodies]
        writer.close()
        raw = [base64.b64decode(row["data"][0]["embedding"]) for row in rows]
        return np.stack([np.frombuffer(one, "<f4") for one in raw])

    ours, theirs = (asyncio.run(ask(server.port)) for server in running.values())
    worst = float(np.abs(ours - theirs).max())
    print(f"largest difference between the servers {worst:.1e}", flush=True)
    if not worst < 1e-3:
        raise RuntimeError("The servers do not compute the same.")


def make_inputs(kind: str) -> list[Any]:
    """Returns 64 inputs."""
    rng = np.random.default_rng(0)
    if kind == "text":
        words = " ".join(CAPTIONS).split()
        return [" ".join(rng.choice(words, rng.integers(4, 25))) for _ in range(64)]
    found = []
    for _ in range(64):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        file = io.BytesIO()
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        found.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
    return found


def make_model(folder: Path, size: str) -> None:
    """Writes a Hugging Face folder with random weights."""
    import torch
    from transformers import AlignConfig, AlignModel

    from align_jax.data import tokenizer
    from align_jax.hf import processor

    config = AlignConfig(vision_config={"image_size": 289})  # as kakaobrain/align-base
    if size == "tiny":
        text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision = {
            "image_size": 64,
            "in_channels": [32, 16, 24],
            "out_channels": [16, 24, 32],
            "kernel_sizes": [3, 3, 5],
            "strides": [1, 2, 2],
            "num_block_repeats": [1, 1, 2],
            "expand_ratios": [1, 6, 6],
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "hidden_dim": 64,
        }
        text |= {"intermediate_size": 128}
        config = AlignConfig(text_config=text, vision_config=vision, projection_dim=32)
    torch.manual_seed(0)
    model = AlignModel(config).eval()
    side = config.vision_config.image_size
    with torch.no_grad():  # moments of real activations: else the features of deep towers vanish
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        model.train().get_image_features(pixel_values=torch.randn(4, 3, side, side))
        model.eval()
    model.save_pretrained(folder)
    tokens = tokenizer.train_wordpiece(CAPTIONS, 200)
    made = processor.Preprocessing(side, side, "pil", 64, tokens.vocab_size, tokens.fingerprint())
    processor.write_processor(folder, tokens, made)


def serve_with_torch(folder: str, most: int) -> None:
    """Serves /v1/embeddings with transformers until it is killed."""
    import torch
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    from transformers import AlignModel, AlignProcessor

    model = AlignModel.from_pretrained(folder).eval()
    processor = AlignProcessor.from_pretrained(folder)
    decoders = ThreadPoolExecutor(os.cpu_count())

    def encode_texts(texts: list[str]) -> Any:
        tokens = processor.tokenizer(
            texts, padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        return model.get_text_features(**tokens)

    def encode_images(pixels: list[Any]) -> Any:
        return model.get_image_features(pixel_values=torch.cat(pixels))

    def decode(uri: str) -> Any:
        image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
        return processor.image_processor(images=image, return_tensors="pt")["pixel_values"]

    def batches(encode: Any, waiting: queue.Queue) -> None:
        while True:
            items = [waiting.get()]
            while len(items) < most and not waiting.empty():
                items.append(waiting.get())
            try:
                with torch.inference_mode():
                    found = encode([given for given, _ in items])
                    found = getattr(found, "pooler_output", found)
                    z = torch.nn.functional.normalize(found, dim=-1).numpy()
                for row, (_, future) in zip(z, items, strict=True):
                    future.set_result(row)
            except Exception as error:
                for _, future in items:
                    future.set_exception(error)

    queues: dict[str, queue.Queue] = {}
    for name, encode in (("text", encode_texts), ("image", encode_images)):
        queues[name] = queue.Queue()
        threading.Thread(target=batches, args=(encode, queues[name]), daemon=True).start()

    async def embeddings(request: Request) -> JSONResponse:
        given, kind = (await request.json())["input"], "text"
        if given.startswith("data:"):
            kind = "image"
            given = await asyncio.get_running_loop().run_in_executor(decoders, decode, given)
        future: Future = Future()
        queues[kind].put((given, future))
        row = await asyncio.wrap_future(future)
        embedding = base64.b64encode(row.astype("<f4").tobytes()).decode()
        return JSONResponse({"data": [{"embedding": embedding}]})

    class Announced(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            port = self.servers[0].sockets[0].getsockname()[1]
            print(f"http://127.0.0.1:{port}\nready", flush=True)

    app = Starlette(routes=[Route("/v1/embeddings", embeddings, methods=["POST"])])
    config = uvicorn.Config(app, port=0, http="h11", log_level="warning", access_log=False)
    Announced(config).run()


if __name__ == "__main__":
    main()
