"""One NVIDIA GPU: the B7 + base training step, encoding and the ring loss, beside torch.

    python experiments/benchmarks/gpu.py --out figures --seconds 540

Runs every section in a process of its own, one after the other, each within its share of the time,
and writes `figures/<section>.json` as it goes: what did not fit is missing, never guessed. Needs
jax with CUDA, torch and transformers, and nothing from the network. Weights are random.

Sections: `ceilings` (copy bandwidth, bfloat16 matrix product), `step` (ours), `torch_step`
(`transformers.AlignModel`, bfloat16 autocast, channels_last, fused AdamW, eager and compiled; one
dense loss), `encode`, `loss` and `loss_million` (ring form, value and gradients).
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

PIXELS, TOKENS, VOCABULARY, WIDTH = 289, 64, 30_522, 640
# section -> seconds at most; torch_step and step stand first, since they are compared.
SECTIONS = {
    "ceilings": 45,
    "step": 200,
    "torch_step": 200,
    "encode": 90,
    "loss": 60,
    "loss_million": 240,
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540.0, help="for all sections together")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument(
        "--batch", type=int, default=0, help="pairs a step; 0: the largest that fits"
    )
    parser.add_argument("--depthwise", choices=("native", "shifted"), default="native")
    parser.add_argument("--run", choices=SECTIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.run:
        if arguments.depthwise == "shifted":  # the form that CPUs take
            from align_jax.models import layers

            layers.depthwise_conv = layers.shifted_depthwise_conv
        globals()[arguments.run](Report(arguments.out / f"{arguments.run}.json"), arguments.batch)
        return
    end = time.monotonic() + arguments.seconds
    for section in arguments.sections.split(","):
        limit = min(SECTIONS[section], end - time.monotonic())
        if limit < 15:
            print(f"{section}: no time left")
            continue
        command = [sys.executable, __file__, "--out", str(arguments.out), "--run", section]
        command += ["--batch", str(arguments.batch), "--depthwise", arguments.depthwise]
        start = time.monotonic()
        try:
            code = subprocess.run(command, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = "stopped at its limit"
        print(f"-- {section}: {code}, {time.monotonic() - start:.0f} s", flush=True)


class Report:
    """Figures of a section: printed and on disk as soon as they are known."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []

    def __call__(self, **row):
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.path.write_text(json.dumps(self.rows, indent=1))


def ceilings(report, batch):
    import jax
    import jax.numpy as jnp

    x = jnp.ones((2**30,), jnp.float32)
    seconds = median_s(jax.jit(lambda x: x + 1), x)
    report(what="copy", gb_per_s=2 * x.nbytes / seconds / 1e9)
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    seconds = median_s(jax.jit(lambda a: a @ a), a)
    report(what="matmul bfloat16", tflops=2 * 8192**3 / seconds / 1e12)
    a = a.astype(jnp.float32)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
    report(what="matmul float32", tflops=2 * 8192**3 / median_s(product, a) / 1e12)
    report(what="device", kind=jax.devices()[0].device_kind, jax=jax.__version__)


def step(report, batch):
    """Our step as `align train` compiles it, at growing batches until one does not fit."""
    import jax

    from align_jax import mesh as mesh_lib
    from align_jax import train, train_step
    from align_jax.models import flops

    mesh = mesh_lib.make_mesh()
    for remat, size in [("none", batch)] if batch else STEP_CASES:
        config = base_config(size, remat)
        start = time.monotonic()
        model, optimizer, abstract, step_fn = train.make_program(
            config, mesh, vocab_size=VOCABULARY
        )
        state = train_step.init_state(model, optimizer, abstract, seed=0)
        arrays = mesh_lib.put_batch(make_batch(size), mesh_lib.batch_sharding(mesh))
        report(what="state made", seconds=time.monotonic() - start)
        try:
            lowered = step_fn.lower(state, arrays)
            report(what="lowered", seconds=time.monotonic() - start)
            compiled = lowered.compile()
            compile_s = time.monotonic() - start
            state, metrics = compiled(state, arrays)
            times = []
            for _ in range(8):
                begin = time.perf_counter()
                state, metrics = compiled(state, arrays)
                jax.block_until_ready(metrics)
                times.append(time.perf_counter() - begin)
        except jax.errors.JaxRuntimeError as error:
            report(what="step", remat=remat, batch=size, failed=str(error).splitlines()[0][:120])
            continue
        seconds = float(np.median(times))
        work = flops.pair_flops(
            model, image_size_px=PIXELS, max_tokens=TOKENS, batch_size=size
        ).model
        analysis = compiled.memory_analysis()
        report(
            what="step",
            remat=remat,
            batch=size,
            ms=1e3 * seconds,
            spread_ms=1e3 * (max(times) - min(times)),
            pairs_per_s=size / seconds,
            model_tflops=work * size / seconds / 1e12,
            bytes_accessed_gb=compiled.cost_analysis().get("bytes accessed", math.nan) / 1e9,
            temporaries_gib=analysis.temp_size_in_bytes / 2**30,
            compile_s=compile_s,
            loss=float(metrics["loss"]),
        )
        del state, arrays, compiled


STEP_CASES = (("none", 128), ("none", 256), ("none", 384), ("block", 768))


def torch_step(report, batch):
    """The step that a torch user writes: AlignModel, autocast, fused AdamW, dense loss."""
    import torch
    from transformers import AlignConfig, AlignModel

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    config = AlignConfig(
        vision_config={"image_size": PIXELS, "hidden_dim": WIDTH}, projection_dim=WIDTH
    )
    model = AlignModel(config).cuda().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def towers(pixels, ids, mask):
        image = model.get_image_features(pixels).pooler_output
        text = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        return image.float(), text.float()

    def one_step(towers, pixels, ids, mask):
        with torch.autocast("cuda", torch.bfloat16):
            image, text = towers(pixels, ids, mask)
        image, text = (z / z.norm(dim=-1, keepdim=True) for z in (image, text))
        logits = image @ text.T / model.temperature
        target = torch.arange(len(logits), device="cuda")
        cross_entropy = torch.nn.functional.cross_entropy
        loss = cross_entropy(logits, target, label_smoothing=0.1)
        loss = loss + cross_entropy(logits.T, target, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for kind in ("eager", "compiled"):
        call = towers if kind == "eager" else torch.compile(towers)
        for size in [batch] if batch else (128, 256, 384) if kind == "eager" else (128, 256):
            arrays = make_batch(size)
            pixels = torch.from_numpy(arrays["image"]).cuda().permute(0, 3, 1, 2).float()
            pixels = (pixels / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            ids = torch.from_numpy(arrays["ids"]).cuda().long()
            mask = torch.from_numpy(arrays["mask"]).cuda().long()
            try:
                begin = time.monotonic()
                for _ in range(3):
                    loss = one_step(call, pixels, ids, mask)
                torch.cuda.synchronize()
                compile_s = time.monotonic() - begin
                times = []
                for _ in range(8):
                    begin = time.perf_counter()
                    loss = one_step(call, pixels, ids, mask)
                    torch.cuda.synchronize()
                    times.append(time.perf_counter() - begin)
            except torch.cuda.OutOfMemoryError as error:
                report(what="torch step", kind=kind, batch=size, failed=str(error)[:120])
                optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                continue
            seconds = float(np.median(times))
            report(
                what="torch step",
                kind=kind,
                batch=size,
                ms=1e3 * seconds,
                spread_ms=1e3 * (max(times) - min(times)),
                pairs_per_s=size / seconds,
                peak_gib=torch.cuda.max_memory_allocated() / 2**30,
                compile_s=compile_s,
                loss=float(loss),
                torch=torch.__version__,
            )


def encode(report, batch):
    """Images and texts of the embedding programs, on the device already."""
    import jax
    import jax.numpy as jnp

    from align_jax import mesh as mesh_lib
    from align_jax.models import dual_encoder

    mesh = mesh_lib.make_mesh()
    config = base_config(256, "none")
    model = dual_encoder.make_model(config.model, config.loss, vocab_size=VOCABULARY)
    shapes = dual_encoder.abstract_variables(model)
    shardings = mesh_lib.infer_shardings(shapes, mesh)
    variables = dual_encoder.init_variables(model, seed=0, shardings=shardings)
    for size in (1, 16, 256):
        arrays = {name: jnp.asarray(value) for name, value in make_batch(size).items()}
        image = jax.jit(lambda v, x: dual_encoder.embed_image(model, v, x))
        seconds = median_s(image, variables, arrays["image"])
        report(what="encode image", batch=size, ms=1e3 * seconds, per_s=size / seconds)
        text = jax.jit(lambda v, ids, mask: dual_encoder.embed_text(model, v, ids, mask))
        seconds = median_s(text, variables, arrays["ids"], arrays["mask"])
        report(what="encode text", batch=size, ms=1e3 * seconds, per_s=size / seconds)


def loss(report, batch, sizes=(16_384, 131_072), tiles=(1024, 8192), repeats=3):
    """The ring form on one device: value and gradients by both embeddings and the temperature."""
    import jax

    from align_jax import losses
    from align_jax import mesh as mesh_lib

    mesh = mesh_lib.make_mesh()
    config = base_config(256, "none").loss
    config.form = "ring"
    scalars = {"temperature": np.float32(0.05)}
    for size in sizes:
        keys = jax.random.split(jax.random.key(0))
        z = [jax.random.normal(key, (size, WIDTH)) for key in keys]
        z = [row / np.sqrt(WIDTH) for row in z]
        for config.tile_size in tiles:
            loss_fn = losses.make_loss(config, mesh)
            value = jax.value_and_grad(lambda *args, f=loss_fn: f(*args, {})[0], (0, 1, 2))
            compiled = jax.jit(value).lower(*z, scalars).compile()
            seconds = median_s(compiled, *z, scalars, repeats=repeats, warm=repeats > 1)
            products = 2 * size**2 * WIDTH * 3  # one forward, two backward, nothing twice
            report(
                what="ring loss and gradients",
                pairs=size,
                tile=config.tile_size,
                ms=1e3 * seconds,
                temporaries_mib=compiled.memory_analysis().temp_size_in_bytes / 2**20,
                model_tflops=products / seconds / 1e12,
            )


def loss_million(report, batch):
    loss(report, batch, sizes=(1_048_576,), tiles=(8192,), repeats=1)


def base_config(batch, remat):
    from align_jax.config import default_config

    config = default_config()  # B7 + base, 640, bfloat16, groups of 16 images
    config.data.source = "scenes?size=10"
    config.model.remat = remat
    config.model.scan_layers = True
    config.optim.name = "adamw"
    config.optim.warmup_steps = 10
    config.train.batch_size = batch
    config.train.steps = 1000
    return config


def make_batch(size):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (size, PIXELS, PIXELS, 3), np.uint8),
        "ids": rng.integers(0, VOCABULARY, (size, TOKENS), np.int32),
        "mask": np.ones((size, TOKENS), np.int32),
        "index": np.arange(size, dtype=np.int32),
    }


def median_s(fn, *args, repeats=10, warm=True):
    """Returns the median seconds of a call; the first one, which may compile, is left out."""
    import jax

    if warm:
        jax.block_until_ready(fn(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
