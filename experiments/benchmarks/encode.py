"""Encoding on CPU: our encode_image and encode_text against torch's AlignModel, align-base size.

    python experiments/benchmarks/encode.py

Each library has a process of its own with the same random weights; they take turns, and while one
computes the other waits for its next command. What is timed is what a user calls, without decoding
and resizing: `model.encode_image(arrays)`, `model.encode_text(texts)` (tokenising included), and
`get_image_features` / `get_text_features` with L2 normalisation on prepared tensors. Needs the
extra `test`; about 6 minutes and 4 GiB on 2 cores.
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

import numpy as np

TOKENS = 30522
SHORT_TOKENS, LONG_TOKENS = 12, 64
# name, what, batch sizes, tokens of a text, tokens that transformers pads it to
CASES = (
    ("image", "image", None, None),
    (f"text, {LONG_TOKENS} tokens", "text", LONG_TOKENS, LONG_TOKENS),
    (f"text, {SHORT_TOKENS} tokens; torch pads to 64", "text", SHORT_TOKENS, LONG_TOKENS),
    (f"text, {SHORT_TOKENS} tokens; torch unpadded", "text", SHORT_TOKENS, SHORT_TOKENS),
)
BATCHES = (1, 16)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="calls timed of each (default: 5)")
    parser.add_argument("--worker", choices=("make", "torch", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker == "make":
        make_folder(args.folder)
    elif args.worker is not None:
        serve(torch_calls(args.folder) if args.worker == "torch" else our_calls(args.folder))
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(folder, args.rounds)


def compare(folder, rounds):
    command = [sys.executable, __file__, "--folder", folder, "--worker"]
    # What `align` sets for itself; see huge_pages.py. Both get it.
    env = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    subprocess.run([*command, "make"], check=True, env=env, stderr=subprocess.DEVNULL)
    workers = {
        name: subprocess.Popen(
            [*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        for name in ("torch", "ours")
    }
    print(", ".join(ask(worker, {"what": "describe"}) for worker in workers.values()))
    print(f"{os.cpu_count()} cores; median of {rounds} calls by turns, ms a call")
    print(f"{'':<40}{'batch':>6}{'torch':>9}{'ours':>9}{'torch / ours':>14}")
    for name, what, tokens, padded in CASES:
        for batch in BATCHES:
            case = {"what": what, "batch": batch, "tokens": tokens, "padded": padded}
            first = {key: ask(worker, case)["z"] for key, worker in workers.items()}
            np.testing.assert_allclose(first["ours"], first["torch"], atol=1e-4)
            times = {key: [] for key in workers}
            for _ in range(rounds):
                for key, worker in workers.items():
                    times[key].append(1e3 * ask(worker, case)["seconds"])
            torch_ms, our_ms = (statistics.median(times[key]) for key in ("torch", "ours"))
            print(f"{name:<40}{batch:>6}{torch_ms:>9.0f}{our_ms:>9.0f}{torch_ms / our_ms:>14.2f}")
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()


def ask(worker, case):
    worker.stdin.write(json.dumps(case) + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def serve(calls):
    """Answers each case on stdin with the seconds of one call and the start of its first row."""
    prepared = {}
    for line in sys.stdin:
        case = json.loads(line)
        if case["what"] == "describe":
            print(json.dumps(calls["describe"]), flush=True)
            continue
        if line not in prepared:
            prepared[line] = calls[case["what"]](case)
        start_s = time.perf_counter()
        z = prepared[line]()
        seconds = time.perf_counter() - start_s
        print(json.dumps({"seconds": seconds, "z": z[0, :8].tolist()}), flush=True)


def inputs(case):
    """Returns images uint8 [B, 346, 346, 3], or texts that become `tokens` ids."""
    rng = np.random.default_rng(0)
    if case["what"] == "image":
        return rng.integers(0, 256, (case["batch"], 346, 346, 3), np.uint8)
    words = rng.integers(0, TOKENS - 5, (case["batch"], case["tokens"] - 2))
    return [" ".join(f"w{word}" for word in row) for row in words]


def our_calls(folder):
    import jax

    import align_jax

    model = align_jax.load(folder)

    def image(case):
        images = list(inputs(case))
        return lambda: model.encode_image(images)

    def text(case):
        texts = inputs(case)
        return lambda: model.encode_text(texts)

    describe = f"jax {jax.__version__} ({jax.devices()[0].platform})"
    return {"describe": describe, "image": image, "text": text}


def torch_calls(folder):
    import torch
    from transformers import AlignModel

    from align_jax.data import tokenizer

    torch.set_num_threads(os.cpu_count())
    model = AlignModel.from_pretrained(folder).eval()
    tokens = tokenizer.load_tokenizer(folder)

    def unit_norm(output):
        z = output.pooler_output  # transformers 5 returns an object
        return (z / z.norm(dim=-1, keepdim=True)).numpy()

    def image(case):
        crop = inputs(case)[:, 28:317, 28:317]
        pixels = torch.from_numpy(crop.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1
        return torch.inference_mode()(lambda: unit_norm(model.get_image_features(pixels)))

    def text(case):
        ids, mask = (torch.from_numpy(a) for a in tokens.encode(inputs(case), case["padded"]))
        arguments = {"input_ids": ids.long(), "attention_mask": mask.long()}
        return torch.inference_mode()(lambda: unit_norm(model.get_text_features(**arguments)))

    describe = f"torch {torch.__version__} ({torch.get_num_threads()} threads)"
    return {"describe": describe, "image": image, "text": text}


def make_folder(folder):
    """Writes an align-base with random weights whose features neither vanish nor explode."""
    import torch
    from transformers import AlignConfig, AlignModel

    from align_jax.data import tokenizer
    from align_jax.hf import processor

    torch.manual_seed(0)
    config = AlignConfig(vision_config={"image_size": 289, "hidden_dim": 640}, projection_dim=640)
    model = AlignModel(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    names = [f"w{n}" for n in range(TOKENS - len(tokenizer.SPECIAL_TOKENS))]
    tokens = tokenizer.wordpiece([*tokenizer.SPECIAL_TOKENS, *names])
    preprocessing = processor.Preprocessing(289, 346, "pil", 64, TOKENS, tokens.fingerprint())
    processor.write_processor(folder, tokens, preprocessing)


if __name__ == "__main__":
    main()
