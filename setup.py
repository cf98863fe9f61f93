"""finemem_jax: reinforcement learning of memory managers for language models, in JAX."""

import pathlib

import setuptools

setuptools.setup(
    name="finemem_jax",
    version="0.1.0",
    description="Trains language models to manage external memory, with fine-grained credit (Fine-Mem), in JAX.",
    long_description=(pathlib.Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=setuptools.find_packages(include=["finemem_jax", "finemem_jax.*"]),
    python_requires=">=3.11",
    install_requires=[
        "absl-py",
        "etils[epath]",  # Paths as Orbax takes them.
        "filelock",
        "flax>=0.12",
        "gguf>=0.17",
        "grain>=0.2.12",
        "httpx>=0.28",
        "huggingface_hub",
        "jax>=0.10",
        "jaxtyping",
        "jinja2",
        "json-repair",
        "matplotlib",
        "ml-collections>=1.1",
        "numpy>=2",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "pyarrow",
        "rich",
        "safetensors>=0.5",
        "scipy",
        "sniffio",  # httpcore looks for it at every request, and if it is missing, six times through sys.path.
        "tenacity>=9",
        "tensorboardX",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.21",
        "transformers>=5",
    ],
    extras_require={
        "gpu": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "bm25s": ["bm25s>=0.3"],  # memory.retrieval='bm25s'
        "constrained": ["llguidance>=1.0"],  # manager.constrained
        "dense": ["wordllama==0.4.0.post1"],  # memory.embedder='wordllama'; this release carries its weights.
        "mcp": ["mcp>=2"],  # python -m finemem_jax.serve
        "rouge": ["rouge-score>=0.1.2", "nltk>=3.10.4"],  # The metrics rouge_l_stemmed and parsed_rouge_l.
        # bm25s and rank-bm25 check our BM25; beartype checks the shapes in signatures.
        "dev": [
            "beartype",
            "bm25s",
            "hypothesis",
            "llguidance",
            "mcp>=2",
            "pyright",
            "pytest",
            "pytest-xdist",
            "nltk>=3.10.4",
            "rank-bm25",
            "regex",
            "rouge-score",
            "ruff",
        ],
    },
)
