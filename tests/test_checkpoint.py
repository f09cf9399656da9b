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


def test_another_schema_is_another_version(tmp_path):
    cfg = tiny_config.get_config()
    stored = config.to_dict(cfg)
    stored["train"]["forgotten"] = 3
    data_state = {"iterator": {"next_index": 1}, "rows": "a"}
    with checkpoint.open_manager(tmp_path, 1) as manager:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(config, "to_dict", lambda _: stored)
            checkpoint.save(manager, 1, {"w": jnp.ones(2)}, {"m": jnp.ones(2)}, data_state, cfg)
        manager.wait_until_finished()
        with pytest.raises(InputError, match=r"another version of msn_jax .*'forgotten'.*or another --workdir"):
            checkpoint.restore(manager, cfg, {}, {})
    with pytest.raises(InputError, match="another version of msn_jax"):
        checkpoint.load_params(tmp_path)


def test_load_params_refuses_what_is_no_workdir(tmp_path):
    with pytest.raises(InputError, match="nowhere: not a training workdir"):
        checkpoint.load_params(tmp_path / "nowhere")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no checkpoint in it"):
        checkpoint.load_params(tmp_path)
