"""Values that `config.check` refuses. `msn_jax.config` must not import JAX."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import tiny_config
from absl import flags
from ml_collections import config_flags

from msn_jax import config
from msn_jax.cli import InputError


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("noise.kind", "loud", "'none' or some of ahead,uniform,token,drafts, separated by commas"),
        ("noise.kind", "ahead,loud", "'none' or some of ahead,uniform,token,drafts, separated by commas"),
        ("noise.kind", "ahead,none", "'none' or some of ahead,uniform,token,drafts, separated by commas"),
        ("noise.kind", "ahead,ahead", "'none' or some of ahead,uniform,token,drafts, separated by commas"),
        ("noise.kind", "ahead,drafts", "without 'drafts', which need config.noise.blocks above 0"),
        ("noise.curriculum_steps", -1, "0 (none) or more"),
        ("noise.label_targets", True, "False without a gated adapter"),
        ("noise.segments", 0, "at least 1"),
        ("noise.length", 0, "at least 1"),
        ("noise.blocks", -1, "0 for segments in the row, or a number of blocks per row"),
        ("noise.weight", 0.0, "a positive number"),
        ("noise.teacher_temperature", 0.0, "above 0"),
        ("noise.self_distillation", True, "False without config.noise.blocks"),
        ("train.steps", 0, "at least 1"),
        ("train.log_every", 0, "at least 1"),
        ("train.checkpoint_every", 0, "at least 1"),
        ("train.keep_checkpoints", 0, "at least 1"),
        ("train.eval_batches", -1, "at least 1"),
        ("train.loss_chunk", 0, "at least 1"),
        ("train.eval_every", -1, "0 (at the end only) or more"),
        ("train.seed", -1, "from 0 to 2**31 - 1"),
        ("train.seed", 2**31, "an integer of 32 bits"),
        ("noise.length", 32, "below config.data.row_length=32"),
        ("train.steps", "10", "of type int"),
        ("data.batch_size", 0, "at least 1"),
        ("data.row_length", 0, "at least 1"),
        ("data.row_length", 65, "at most config.model.max_length=64"),
        ("data.on_bad_record", "ignore", "one of stop, skip"),
        ("data.parse_special_tokens", 1, "of type bool"),
        ("model.n_layers", 0, "at least 1"),
        ("model.n_kv_heads", 0, "at least 1"),
        ("model.n_kv_heads", 3, "a divisor of config.model.n_heads=2"),
        ("model.head_dim", 7, "even"),
        ("model.sliding_window", -1, "0 (none) or more"),
        ("model.rope_theta", 0.0, "above 0"),
        ("model.rope_theta", 1e-300, "a number that float32 can represent"),
        ("model.max_length", 10**14, "an integer of 32 bits"),
        ("model.norm_eps", -1e-5, "above 0"),
        ("model.qk_norm", 1, "of type bool"),
        ("model.rope_scaling", "yarn", "one of none, linear, llama3"),
        ("model.rope_factor", 2.0, "left at 0, because config.model.rope_scaling='none'"),
        ("model.dtype", "float8", "one of float32, bfloat16, float16"),
        ("model.param_dtype", "int8", "one of float32, bfloat16, float16"),
        ("optim.learning_rate", 0.0, "above 0"),
        ("optim.learning_rate", float("nan"), "finite"),
        ("optim.learning_rate", 1e39, "a number that float32 can represent"),
        ("optim.clip_norm", 0.0, "above 0"),
        ("optim.clip_norm", -1, "above 0"),
        ("optim.warmup_steps", -1, "0 or more"),
        ("optim.weight_decay", -0.1, "0 or more"),
        ("optim.b1", 1.0, "0 or more and below 1"),
        ("optim.b2", -0.5, "0 or more and below 1"),
        ("optim.final_fraction", -1.0, "from 0 to 1"),
        ("optim.final_fraction", 1.5, "from 0 to 1"),
    ],
)
def test_check_names_the_field_its_value_and_the_valid_values(field, value, expected):
    cfg = tiny_config.get_config()
    section, name = field.split(".")
    setattr(getattr(cfg, section), name, value)
    with pytest.raises(InputError, match=f"^{re.escape(f'config.{field}={value!r}: must be {expected}')}$"):
        config.check(cfg)


def test_drafts_need_a_token_before_them():
    cfg = tiny_config.get_config()
    cfg.noise.kind, cfg.noise.blocks, cfg.noise.length = "token, drafts", 2, 2
    config.check(cfg)
    cfg.noise.length = 1
    with pytest.raises(InputError, match=r"^config\.noise\.length=1: must be at least 2 with 'drafts'$"):
        config.check(cfg)
    cfg.noise.length, cfg.noise.blocks, cfg.noise.kind = 2, 0, "token,ahead"
    with pytest.raises(InputError, match=r"^config\.noise\.token=0: must be a token of the vocabulary, with"):
        config.check(cfg)


def test_the_noise_token_is_that_of_a_mixture_too():
    tokens = [config.noise_token(config.NoiseConfig(kind, token=5)) for kind in ("token", "ahead, token", "ahead")]
    assert tokens == [5, 5, None]


def test_check_accepts_valid_values():
    cfg = tiny_config.get_config()
    config.check(cfg)
    cfg.noise.kind, cfg.noise.curriculum_steps = "ahead, uniform", 9
    config.check(cfg)
    cfg.noise.kind, cfg.noise.segments, cfg.optim.learning_rate = "none", 0, 1
    with pytest.raises(InputError, match="curriculum_steps=9: must be 0 with"):
        config.check(cfg)
    cfg.noise.curriculum_steps = 0
    config.check(cfg)


def test_llama3_scaling_needs_all_its_constants_with_low_below_high():
    cfg = tiny_config.get_config()
    constants = {"rope_factor": 8.0, "rope_low_frequency_factor": 1.0, "rope_high_frequency_factor": 4.0}
    constants |= {"rope_original_length": 8192, "rope_scaling": "llama3"}
    valid = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **constants))
    config.check(valid)
    for name in config.ROPE_CONSTANTS["llama3"]:
        invalid = dataclasses.replace(valid, model=dataclasses.replace(valid.model, **{name: 0}))
        with pytest.raises(InputError, match=f"config.model.{name}=0: must be above 0, because"):
            config.check(invalid)
    invalid = dataclasses.replace(valid, model=dataclasses.replace(valid.model, rope_high_frequency_factor=1.0))
    with pytest.raises(InputError, match=r"must be above config\.model\.rope_low_frequency_factor=1"):
        config.check(invalid)


def test_model_fields_round_trip_through_flags_and_json(monkeypatch):
    values = flags.FlagValues()
    fields = {"rope_scaling": "linear", "rope_factor": 4.0, "sliding_window": 7, "qkv_bias": True, "qk_norm": True}
    monkeypatch.setattr(sys, "argv", ["program", *(f"--config.model.{name}={fields[name]}" for name in fields)])
    config_flags.DEFINE_config_file("config", tiny_config.__file__, flag_values=values)
    values(sys.argv)
    expected = dataclasses.replace(tiny_config.get_config().model, **fields)
    assert values.config.model == expected and hash(values.config.model) == hash(expected)
    assert config.from_dict(json.loads(json.dumps(config.to_dict(values.config)))) == values.config
    config.check(values.config)


def test_importing_config_does_not_import_jax():
    code = "import sys; sys.modules['jax'] = None; import msn_jax.config"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_resumed_run_must_have_the_same_config():
    cfg = tiny_config.get_config()
    stored = config.to_dict(cfg)
    config.check_resume(stored, cfg, "w")
    cfg.train.steps, cfg.mesh.fsdp, cfg.data.data_dir = 99, 2, "elsewhere"
    config.check_resume(stored, cfg, "w")
    cfg.model.rope_theta = 7.0
    with pytest.raises(InputError, match=r"^w: .*config\.model\.rope_theta=1000\.0, this one has 7\.0"):
        config.check_resume(stored, cfg, "w")


def test_a_field_that_an_older_run_does_not_have_counts_as_its_default():
    cfg = tiny_config.get_config()
    stored = config.to_dict(cfg)
    del stored["data"]["on_bad_record"]
    config.check_resume(stored, cfg, "w")
    cfg.data.on_bad_record = "skip"
    with pytest.raises(InputError, match=r"config\.data\.on_bad_record='stop', this one has 'skip'"):
        config.check_resume(stored, cfg, "w")
