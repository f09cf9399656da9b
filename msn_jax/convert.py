"""Training workdir -> Hugging Face directory, or the other way.

    python -m msn_jax.convert --source=runs/msn --target=exports/msn            # for transformers and serving engines
    python -m msn_jax.convert --source=PATH/Llama-3.2-1B --target=runs/llama    # for `--config.train.init_from`

The target is of the other kind than the source. Nothing is computed: exported tensors are those of the checkpoint, bit
for bit, unless `--dtype` rounds them.
"""

from absl import flags

from msn_jax import checkpoint, cli, config, hugging_face, pretrained, sharding
from msn_jax.config import MeshConfig
from msn_jax.data import tokenizer as tokenizers


def convert(source: str, target: str, dtype: str | None = None) -> None:
    """Converts a model. The target appears whole or not at all.

    Args:
      source: a training workdir, or a Hugging Face directory.
      target: a directory that does not exist yet, or is empty.
      dtype: of the target's parameters; None is the source's.

    Raises:
      InputError: no such source, a target that cannot be made or has something in it, or a tokenizer that does not fit
        the model.
    """
    path = pretrained.directory(source)
    checkpoint.check_new(target, f"--target={target}")  # before the model is read
    tokenizer = tokenizers.load(path)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1))
    model = pretrained.load(path, mesh, sharding.TRAIN_RULES, stacked=True, dtype=dtype)
    tokenizers.check_fits(tokenizer, model.cfg.vocab_size, str(path))
    if checkpoint.is_workdir(path):
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
    """Reads the flags and converts."""
    convert(flags.FLAGS.source, flags.FLAGS.target, flags.FLAGS.dtype)
    print(f"{flags.FLAGS.target}: written")


if __name__ == "__main__":
    flags.DEFINE_string("source", None, "A training workdir, or a Hugging Face directory.", required=True)
    flags.DEFINE_string("target", None, "A new directory, of the other kind.", required=True)
    flags.DEFINE_enum("dtype", None, config.DTYPES, "Of the target's parameters; as the source's if not given.")
    cli.run(main)
