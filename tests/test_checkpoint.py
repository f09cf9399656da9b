import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config

from msn_jax import checkpoint, config
from msn_jax.cli import InputError


def test_fingerprint_sees_one_bit_and_no_mesh():
    tree = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(3, jnp.bfloat16), "c": jnp.zeros((), jnp.int32)}
    value = checkpoint.fingerprint(tree)
    assert value == checkpoint.fingerprint(jax.tree.map(np.asarray, tree))
    assert value != checkpoint.fingerprint(tree | {"a": tree["a"].at[1, 2].set(np.nextafter(np.float32(6), 7))})
    mesh = jax.make_mesh((8,), ("data",))
    spread = jax.device_put(jnp.arange(64.0), jax.NamedSharding(mesh, jax.P("data")))
    assert checkpoint.fingerprint(spread) == checkpoint.fingerprint(np.arange(64, dtype=np.float32))


def test_check_config_names_the_first_difference():
    cfg = tiny_config.get_config()
    stored = config.to_dict(cfg)
    checkpoint.check_config(stored, cfg, "w")
    cfg.train.steps, cfg.mesh.fsdp, cfg.data.data_dir = 99, 2, "elsewhere"
    checkpoint.check_config(stored, cfg, "w")
    cfg.model.rope_theta = 7.0
    with pytest.raises(InputError, match=r"^w: .*config\.model\.rope_theta=1000\.0, this one has 7\.0"):
        checkpoint.check_config(stored, cfg, "w")


def test_load_params_refuses_what_is_no_workdir(tmp_path):
    with pytest.raises(InputError, match="nowhere: not a training workdir"):
        checkpoint.load_params(tmp_path / "nowhere")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no checkpoint in it"):
        checkpoint.load_params(tmp_path)
