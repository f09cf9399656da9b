"""The benchmark of an adapter's training step, and that the step computes little more than it must."""

import dataclasses
import json

import commands
import jax
import jax.numpy as jnp
import pytest
import tiny_config

from benchmarks import adapter_train
from msn_jax.config import AdapterConfig, NoiseConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")
TINY = commands.ROOT / "tests/tiny_config.py"


def config(length=4, blocks=64, first_layer=0, kind="token", **train_fields):
    cfg = tiny_config.get_config()
    widths = {"d_model": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "d_mlp": 192}
    cfg.model = dataclasses.replace(cfg.model, max_length=256, **widths)
    cfg.data.row_length, cfg.data.batch_size = 128, 2
    cfg.train = dataclasses.replace(cfg.train, **train_fields)
    cfg.noise = NoiseConfig(kind=kind, token=7, blocks=blocks, length=length)
    cfg.adapter = AdapterConfig(rank=8, first_layer=first_layer)
    return cfg


def ratio(cfg):
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        program = adapter_train.step(cfg).trace(*adapter_train.abstract_arguments(cfg))
    return adapter_train.operations(program.jaxpr.jaxpr) / sum(adapter_train.theory(cfg).values())


@pytest.mark.parametrize(
    "cfg",
    [
        config(length=2, blocks=64),
        config(length=4, blocks=64),
        config(length=1, blocks=100),
        config(first_layer=2),
        config(unroll=3),
        config(length=5, blocks=27, loss_chunk=256),  # 135 tokens of each row, in chunks of 128
        config(length=3, kind="token,drafts"),
    ],
    ids=["2", "4", "1", "first_layer", "unroll", "chunks", "drafts"],
)
def test_a_step_costs_at_most_15_percent_more_than_theory(cfg):
    assert 0.99 < ratio(cfg) < 1.15


def test_recomputation_costs_more():
    assert ratio(config(remat=True)) > 1.3


def test_xla_counts_the_same_operations():
    cfg = config()
    with jax.numpy_dtype_promotion("standard"):
        counted = adapter_train.xla_operations(cfg) / sum(adapter_train.theory(cfg).values())
    assert ratio(cfg) < counted < 1.1 * ratio(cfg)  # it also counts norms, softmax and the optimizer


def test_products_in_loops_count_as_often_as_they_run():
    def program(x, w):
        x @ w  # its result is not used
        x, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)
        x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x)
        return jax.checkpoint(lambda x: jax.jit(jnp.matmul)(x, w))(x)

    x, w = jnp.ones((3, 4)), jnp.ones((4, 4))
    one = 2 * 3 * 4 * 4
    assert adapter_train.operations(jax.make_jaxpr(program)(x, w).jaxpr) == (5 + 2 + 1) * one
    loop = jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x))(w)
    with pytest.raises(ValueError, match="while_loop"):
        adapter_train.operations(loop.jaxpr)


def test_adapter_train_command(tmp_path):
    small = [f"--config={TINY}", "--config.noise.blocks=8", "--config.train.init_from=x", "--output=x.json"]
    results = commands.run(
        "benchmarks.adapter_train", [[*small, "--config.adapter.rank=4", "--repeats=2"], small], tmp_path
    )
    assert [code for code, _, _ in results] == [0, 2], results
    assert "must train a gated adapter" in results[1][2]
    report = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert report["theory"] == pytest.approx(sum(report["theory_terms"].values()))
    assert report["operations_ratio"] == report["operations"] / report["theory"]
    assert report["xla_operations_ratio"] > report["operations_ratio"]
    assert report["block_tokens_per_step"] == 8 * 8 * 3
    assert report["block_tokens_per_second"] == report["block_tokens_per_step"] / report["median_step_seconds"]
    fastest = max(report["matrix_operations_per_second"].values())
    assert report["matrix_share"] == pytest.approx(report["operations_per_second"] / fastest)
    assert report["fastest_matrix_share"] >= report["matrix_share"]
    adapter, model = (report["gradients_and_optimizer"][name] for name in ("adapter_bytes", "model_bytes"))
    assert report["gradients_and_optimizer"]["share_percent"] == 100 * adapter / model
    assert report["temporary_bytes"] > 0
