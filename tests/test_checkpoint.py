import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config

from msn_jax import checkpoint, config, param_checks
from msn_jax.cli import InputError


def test_the_fingerprint_depends_on_every_bit_and_not_on_the_mesh():
    tree = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(3, jnp.bfloat16), "c": jnp.zeros((), jnp.int32)}
    value = param_checks.fingerprint(tree)
    assert value == param_checks.fingerprint(jax.tree.map(np.asarray, tree))
    assert value != param_checks.fingerprint(tree | {"a": tree["a"].at[1, 2].set(np.nextafter(np.float32(6), 7))})
    mesh = jax.make_mesh((8,), ("data",))
    sharded = jax.device_put(jnp.arange(64.0), jax.NamedSharding(mesh, jax.P("data")))
    assert param_checks.fingerprint(sharded) == param_checks.fingerprint(np.arange(64, dtype=np.float32))


def test_a_config_with_unknown_fields_is_of_another_version(tmp_path):
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


def test_load_params_needs_a_workdir_with_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match="nowhere: not a training workdir"):
        checkpoint.load_params(tmp_path / "nowhere")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no checkpoint in it"):
        checkpoint.load_params(tmp_path)


def test_a_run_does_not_resume_from_weights_that_are_not_finite(tmp_path):
    cfg = tiny_config.get_config()
    params, data_state = {"w": jnp.ones(2), "v": jnp.array([1.0, jnp.inf])}, {"iterator": {}, "rows": "a"}
    abstract = jax.eval_shape(lambda: params)
    with checkpoint.open_manager(tmp_path, 1) as manager:
        checkpoint.save(manager, 7, params, {"m": jnp.ones(2)}, data_state, cfg)
        manager.wait_until_finished()
        with pytest.raises(InputError, match=r"checkpoints/7: parameter 'v' has values that are NaN or infinite"):
            checkpoint.restore(manager, cfg, abstract, {"m": jax.ShapeDtypeStruct((2,), jnp.float32)})


def test_a_file_in_place_of_the_checkpoints_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(InputError, match="checkpoints: is a file, not a directory"):
        checkpoint.open_manager(tmp_path, 1)
