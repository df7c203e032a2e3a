"""Packaging of align_jax; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "align_jax/__init__.py").read_text())[1]

CURATE = [
    "ahocorasick-rs>=1.0,<2",
    "ibis-framework[duckdb]>=12,<13",
    "icu4py>=1.2,<2",  # words of scripts that have no spaces between them
    "pyarrow>=17",
]
ONNX = ["onnx>=1.19", "onnxruntime>=1.23", "onnxscript>=0.5", "torch==2.13.0"]
SEARCH = ["pymilvus>=3.0,<4", "milvus-lite>=3.2.2,<4"]  # 3.2.0 of Lite drops nprobe and ef
SERVE = [
    "h11>=0.16",
    "msgspec>=0.21",
    "prometheus-client>=0.22",
    "starlette>=1.0,<2",
    "uvicorn>=0.54",
]

setup(
    name="align_jax",
    version=version,
    description="ALIGN (EfficientNet + BERT) in JAX: train, evaluate, use.",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["align_jax", "align_jax.*"]),
    package_data={
        "align_jax.evals.presets": ["*.json"],
        "align_jax.models": ["*.cc"],
        "align_jax.serve": ["page/*"],
    },
    install_requires=[
        "absl-py",
        "array_record",
        "flax>=0.12,<0.13",
        "grain>=0.2.18,<0.3",
        "huggingface_hub>=0.34",
        "jax>=0.10,<0.12",
        "matplotlib>=3.9",
        "ml-collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",  # the v1 API is still called experimental
        "pillow>=11.0",
        "safetensors>=0.7",
        "scipy",
        "sentencepiece>=0.2",  # transformers opens *.model files with it
        "tensorboard>=2.20",
        "tensorflow-datasets>=4.9.10,<5",
        "tokenizers>=0.22",
        "tqdm",
        "transformers>=5.24,<6",
    ],
    extras_require={
        "curate": CURATE,
        "eval": ["scikit-learn>=1.5"],
        "parquet": ["pyarrow>=17"],
        "search": SEARCH,
        "serve": SERVE,
        "onnx": ONNX,
        "fast": ["simplejpeg>=1.9,<2"],
        "spark": ["ibis-framework[pyspark]>=12,<13"],  # and Java 17 or later
        # Beam holds protobuf below 7, with which later versions of sentencepiece do not import.
        "beam": ["apache-beam>=2.77,<3", "sentencepiece<0.2.3"],
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "test": [
            *CURATE,
            *ONNX,
            *SEARCH,
            *SERVE,
            "cohere",
            "httpx",
            "imagehash",
            "openai",
            "pandas",
            "peft>=0.18",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "schemathesis>=4.32",
            "scikit-learn>=1.5",
            "selenium>=4.20",  # the page, where Chromium is installed
            "simplejpeg>=1.9,<2",
        ],
    },
    entry_points={"console_scripts": ["align = align_jax.cli.main:main"]},
)
