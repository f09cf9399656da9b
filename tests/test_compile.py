"""The benchmark that compiles for TPUs: what it reads from a compiled module, and what it refuses."""

import functools
import subprocess
import sys
from importlib import util

import commands
import jax
import jax.numpy as jnp
import pytest
import refusals
from jax.sharding import PartitionSpec

from benchmarks import compile as compile_benchmark
from msn_jax import sharding
from msn_jax.config import MeshConfig


def test_collectives_in_loops_count_as_often_as_they_run():
    mesh = sharding.make_mesh(MeshConfig(data=8))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec(), check_vma=False
    )
    def total(x):
        def body(carry, _):
            return carry + jax.lax.psum(x * carry, "data"), None

        carry, _ = jax.lax.scan(body, x, None, length=5)
        return jax.lax.all_gather(carry, "data").sum(axis=0)

    x = jnp.ones((16, 3), jnp.float32)
    counted = compile_benchmark.count_collectives(jax.jit(total).lower(x).compile().as_text())
    assert counted == {
        "all-reduce": {"count": 5, "bytes": 5 * 2 * 3 * 4},
        "all-gather": {"count": 1, "bytes": 8 * 2 * 3 * 4},
    }


def test_an_asynchronous_collective_counts_its_results():
    hlo = """ENTRY %main (a: bf16[4,8]) -> bf16[8,8] {
  %start = ((bf16[4,8], f32[4]), (bf16[8,8]{1,0}, f32[8]), u32[]) all-gather-start(%a, %b), dimensions={0}
  ROOT %done = (bf16[8,8]{1,0}, f32[8]) all-gather-done(%start)
}"""
    assert compile_benchmark.count_collectives(hlo) == {"all-gather": {"count": 1, "bytes": 8 * 8 * 2 + 8 * 4}}


def test_collectives_in_branches_count():
    hlo = """%one (a: f32[4]) -> f32[4] {
  ROOT %sum = f32[4]{0} all-reduce(%a), to_apply=%add
}
ENTRY %main (a: f32[4], i: s32[]) -> f32[4] {
  ROOT %choice = f32[4]{0} conditional(%i, %a, %a), branch_computations={%zero, %one}
}"""
    assert compile_benchmark.count_collectives(hlo) == {"all-reduce": {"count": 1, "bytes": 16}}


@pytest.mark.parametrize("topology", ["b300:8", "v5e"])
def test_an_unknown_topology_is_refused(topology):
    message = refusals.refusal(compile_benchmark.describe_devices, topology)
    assert message.startswith(f"--topology={topology}: ")


@pytest.mark.slow
@pytest.mark.skipif(util.find_spec("libtpu") is None, reason="needs the extra tpu-compile")
@pytest.mark.parametrize("options", [[], ["--decode", "--widths=4", "--batch_sizes=2", "--capacity=256"]])
def test_a_small_model_compiles_for_a_tpu(options):
    flags = ["--config=configs/demo.py:base", "--topology=v5e:2x4", *options]
    command = [sys.executable, "-m", "benchmarks.compile", *flags]
    done = subprocess.run(command, cwd=commands.ROOT, capture_output=True, text=True, check=True)
    assert '"topology": "v5e:2x4"' in done.stdout and '"total_bytes"' in done.stdout
