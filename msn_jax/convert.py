"""Converts a training workdir or a GGUF model into a Hugging Face directory, and a Hugging Face directory to a workdir.

    python -m msn_jax.convert --source=runs/msn --target=exports/msn            # for transformers and serving engines
    python -m msn_jax.convert --source=PATH/Llama-3.2-1B --target=runs/llama    # for `--config.train.init_from`
    python -m msn_jax.convert --source=PATH/model-Q4_K_M.gguf --target=models/model

The kind of the source determines the direction. Tensors are copied bit for bit, unless `--dtype` rounds them; those of
a GGUF model are dequantized.
"""

from pathlib import Path

from absl import flags

from msn_jax import checkpoint, cli, config, hugging_face, pretrained, sharding
from msn_jax.cli import InputError
from msn_jax.config import MeshConfig
from msn_jax.data import tokenizer as tokenizers
from msn_jax.gguf import container


def convert(source: str, target: str, dtype: str | None = None) -> None:
    """Converts a model. Atomic: the target is complete or absent.

    Args:
      source: a training workdir, a Hugging Face directory or a GGUF file.
      target: directory that is absent or empty, outside of the source.
      dtype: dtype of the target's parameters; None keeps the source's.

    Raises:
      InputError: there is no such source, the target cannot be made or is not empty, the model is damaged, or the
        tokenizer does not fit it.
    """
    checkpoint.check_new(target, f"--target={target}")  # before the model is downloaded or read
    path = pretrained.directory(source)
    if Path(target).resolve().is_relative_to(path.resolve()):
        raise InputError(f"--target={target}: is inside --source={source}: name a directory outside of it")
    tokenizer = tokenizers.load(path)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1))
    model = pretrained.load(path, mesh, sharding.TRAIN_RULES, stacked=True, dtype=dtype)
    tokenizers.check_fits(tokenizer, model.cfg.vocab_size, str(path))
    if checkpoint.is_workdir(path) or container.is_gguf(path):
        hugging_face.export(
            model.params,
            model.cfg,
            target,
            run=model.run,
            generation=hugging_face.generation_config(tokenizer),
            files=hugging_face.tokenizer_files(tokenizer),
        )
    else:
        with checkpoint.whole_directory(target) as workdir:
            tokenizers.save(tokenizer, workdir)
            checkpoint.save_model(workdir, model.params, model.cfg)


def main() -> None:
    """Converts the model that the flags name."""
    convert(flags.FLAGS.source, flags.FLAGS.target, flags.FLAGS.dtype)
    print(f"{flags.FLAGS.target}: written")


if __name__ == "__main__":
    flags.DEFINE_string("source", None, "A training workdir, a Hugging Face directory or a GGUF file.", required=True)
    flags.DEFINE_string(
        "target", None, "Directory to make: a workdir if the source is a Hugging Face directory.", required=True
    )
    flags.DEFINE_enum("dtype", None, config.DTYPES, "Dtype of the target's parameters; default: the source's.")
    cli.run(main)
