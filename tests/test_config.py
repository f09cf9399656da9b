"""What `config.check` refuses. That it imports no JAX is part of its contract."""

import re
import subprocess
import sys

import pytest
import tiny_config

from msn_jax import config
from msn_jax.cli import InputError


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("noise.kind", "loud", "one of ahead, uniform, none"),
        ("noise.segments", 0, "at least 1"),
        ("noise.length", 0, "at least 1"),
        ("train.steps", 0, "at least 1"),
        ("train.log_every", 0, "at least 1"),
        ("train.checkpoint_every", 0, "at least 1"),
        ("train.keep_checkpoints", 0, "at least 1"),
        ("train.eval_batches", -1, "at least 1"),
        ("train.loss_chunk", 0, "at least 1"),
        ("train.eval_every", -1, "0 (at the end only) or more"),
        ("train.seed", -1, "from 0 to 2**31 - 1"),
        ("train.seed", 2**31, "from 0 to 2**31 - 1"),
        ("train.steps", "10", "of type int"),
        ("data.batch_size", 0, "at least 1"),
        ("data.row_length", 0, "at least 1"),
        ("data.row_length", 65, "at most config.model.max_length=64"),
        ("model.n_layers", 0, "at least 1"),
        ("model.n_kv_heads", 0, "at least 1"),
        ("model.n_kv_heads", 3, "a divisor of config.model.n_heads=2"),
        ("model.head_dim", 7, "even"),
        ("model.dtype", "float8", "one of float32, bfloat16, float16, float64"),
        ("model.param_dtype", "int8", "one of float32, bfloat16, float16, float64"),
        ("optim.learning_rate", 0.0, "above 0"),
        ("optim.learning_rate", float("nan"), "finite"),
    ],
)
def test_check_names_the_field_its_value_and_what_would_do(field, value, wanted):
    cfg = tiny_config.get_config()
    section, name = field.split(".")
    setattr(getattr(cfg, section), name, value)
    with pytest.raises(InputError, match=f"^{re.escape(f'config.{field}={value!r}: must be {wanted}')}$"):
        config.check(cfg)


def test_check_lets_good_values_pass():
    cfg = tiny_config.get_config()
    config.check(cfg)
    cfg.noise.kind, cfg.noise.segments, cfg.optim.learning_rate = "none", 0, 1
    config.check(cfg)


def test_a_config_needs_no_jax():
    code = "import sys; sys.modules['jax'] = None; import msn_jax.config"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
