"""Make Some Noise in JAX: train a Llama to denoise, then decode several tokens per forward pass with nothing added.

    model = msn_jax.load("runs/demo/msn")
    for generation in msn_jax.generate(model, ["def area(width, height):\n"], decoder="tr_jacobi"):
        print(generation.text, generation.mean_accepted_tokens)

The names are loaded on first use, so that programs without JAX (`launch/`) can import the package.
"""

__all__ = ["Chat", "Generation", "Model", "Request", "StreamChunk", "generate", "load", "stream"]


def __getattr__(name: str):
    if name in __all__:
        from msn_jax.decode import engine, models

        return getattr(models if name in ("Model", "load") else engine, name)
    raise AttributeError(f"module 'msn_jax' has no attribute {name!r}")
