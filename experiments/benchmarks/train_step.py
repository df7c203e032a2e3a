"""A whole training step on CPU: ours as `align train` compiles it, against torch's AlignModel.

    python experiments/benchmarks/train_step.py --size nano --rounds 5

Each library has a process of its own with the same random weights and the same batch, and they take
turns: forward, loss, backward and AdamW, float32, no dropout, nothing rematerialised. Torch runs
`transformers.AlignModel` in channels_last with the fused AdamW. Both losses of the first step are
printed: equal where one BatchNorm group holds the batch, near otherwise, since torch knows no
groups. CPU time counts all threads, those of torch that spin included: on a busy machine set
OMP_WAIT_POLICY=passive and GOMP_SPINCOUNT=0. Needs the extra `test`; align-base takes 8 GiB.
`--config.x=y` changes our config, as in `--config.model.remat=block`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Size(NamedTuple):
    image: str
    text: str
    embed_dim: int  # of the trunk's width, so that no projection of it is left
    pixels: int
    batch: int
    tokens: int
    vocabulary: int
    group: int  # images of a BatchNorm group


SIZES = {
    "nano": Size("nano", "tiny", 160, 64, 64, 20, 512, 64),  # the quickstart's
    "nano-256": Size("nano", "tiny", 160, 64, 256, 20, 512, 64),
    "b0": Size("b0", "mini", 320, 96, 32, 64, 30522, 16),
    "align-base": Size("b7", "base", 640, 289, 4, 64, 30522, 4),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="steps timed of each (default: 5)")
    parser.add_argument("--worker", choices=("make", "torch", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.worker is None:
        print(f"{os.cpu_count()} cores; median of {args.rounds} steps by turns, ms a step")
        print(f"{'':<12}{'':>8}{'torch':>9}{'ours':>9}{'torch / ours':>14}")
        for name in args.size or SIZES:
            with tempfile.TemporaryDirectory() as folder:
                compare(name, args.rounds, folder, overrides)
        return
    (name,) = args.size
    if args.worker == "make":
        make_folder(name, args.folder, overrides)
    else:
        make_step = torch_step if args.worker == "torch" else our_step
        serve(*make_step(name, args.folder, overrides))


def compare(name, rounds, folder, overrides):
    command = [sys.executable, __file__, "--size", name, "--folder", folder, *overrides, "--worker"]
    # What `align` sets for itself; see huge_pages.py. Both get it.
    env = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    subprocess.run([*command, "make"], check=True, env=env, stderr=subprocess.DEVNULL)
    workers = {
        library: subprocess.Popen(
            [*command, library], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        for library in ("torch", "ours")
    }
    about = {library: json.loads(worker.stdout.readline()) for library, worker in workers.items()}
    steps = {library: [] for library in workers}
    for _ in range(rounds + 2):  # two to warm up
        for library, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            steps[library].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    for kind in ("wall", "cpu"):
        torch_ms, our_ms = (
            1e3 * statistics.median(step[kind] for step in steps[library][2:])
            for library in ("torch", "ours")
        )
        print(f"{name:<12}{kind:>8}{torch_ms:>9.0f}{our_ms:>9.0f}{torch_ms / our_ms:>14.2f}")
    losses = ", ".join(f"{library} {steps[library][0]['loss']:.5f}" for library in workers)
    print(f"{name:<12} first loss {losses}; our temporaries {about['ours']['temporaries']} MiB")


def serve(step, about):
    """Runs a step for each line on stdin, and answers with its seconds and its loss."""
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall": wall, "cpu": cpu, "loss": loss}), flush=True)


def get_config(name):
    from align_jax.config import default_config

    size = SIZES[name]
    c = default_config()
    c.model.image.variant, c.model.text.variant = size.image, size.text
    c.model.image.drop_path_rate = c.model.text.dropout_rate = 0.0
    c.model.embed_dim, c.model.bn_group_size, c.model.dtype = size.embed_dim, size.group, "float32"
    c.data.source, c.data.image_size, c.data.max_tokens = "scenes?size=9", size.pixels, size.tokens
    c.optim.name = "adamw"
    c.optim.warmup_steps = 10
    c.train.batch_size, c.train.steps = size.batch, 1000
    return c


def our_program(name, overrides):
    """Returns (model, jitted step, first state) as `align train` makes them."""
    from align_jax import config, mesh, train, train_step

    c = config.load_config(f"{__file__}:{name}", overrides)
    model, optimizer, abstract, step_fn = train.make_program(
        c, mesh.make_mesh(1, 1), vocab_size=SIZES[name].vocabulary
    )
    return model, step_fn, train_step.init_state(model, optimizer, abstract, seed=0)


def our_step(name, folder, overrides):
    import jax

    _, step_fn, state = our_program(name, overrides)
    batch = jax.device_put(make_batch(SIZES[name]))
    compiled = step_fn.lower(state, batch).compile()

    def step():
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return step, {"temporaries": round(temporaries / 2**20)}


def torch_step(name, folder, _):
    import torch
    from transformers import AlignModel

    torch.set_num_threads(os.cpu_count())
    model = AlignModel.from_pretrained(folder).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = make_batch(SIZES[name])
    pixels = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    inputs = {
        "pixel_values": pixels.contiguous(memory_format=torch.channels_last),
        "input_ids": torch.from_numpy(batch["ids"]).long(),
        "attention_mask": torch.from_numpy(batch["mask"]).long(),
    }

    def step():
        loss = model(**inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return 2 * loss.item()  # transformers takes the mean of both directions, we their sum

    return step, {}


def make_folder(name, folder, overrides):
    """Writes our first weights as transformers reads them."""
    from align_jax.hf import config, convert, weights

    model, _, state = our_program(name, overrides)
    content = config.hf_from_model(model, image_size=SIZES[name].pixels).to_json_string()
    (folder / "config.json").write_text(content)
    weights.write_safetensors(folder / "model.safetensors", convert.to_hf(state.variables(), model))


def make_batch(size):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (size.batch, size.pixels, size.pixels, 3), np.uint8),
        "ids": rng.integers(5, size.vocabulary, (size.batch, size.tokens), np.int32),
        "mask": np.ones((size.batch, size.tokens), np.int32),
        "index": np.arange(size.batch, dtype=np.int32),
    }


if __name__ == "__main__":
    main()
