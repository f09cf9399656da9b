"""Decoding on a mesh: rows are sharded over `data`, heads and weights over `tensor`; the output is unchanged."""

import dataclasses

import jax
import pytest
import tiny
from jax.sharding import PartitionSpec

import msn_jax
from msn_jax import llama, sharding
from msn_jax.cli import InputError
from msn_jax.config import MeshConfig
from msn_jax.decode import loop
from msn_jax.decode.engine import Decoder
from msn_jax.decode.models import Model
from msn_jax.decode.request import Request

pytestmark = pytest.mark.usefixtures("quick_compilation")

REQUESTS = [
    Request("the cat sat on", 20),
    Request("a", 30, temperature=1.0, top_p=0.9, seed=1),
    Request([{"role": "user", "content": "dog"}], 12, stop=("t",)),
    Request("mat " * 12, 25, temperature=0.8, top_k=9),
    Request("on the cat", 7),
]


def on_mesh(model: Model, data: int, tensor: int) -> Model:
    mesh = sharding.make_mesh(MeshConfig(data=data, fsdp=1, tensor=tensor), jax.devices()[: data * tensor])
    boxed = jax.eval_shape(lambda: llama.init(jax.random.key(0), model.cfg, stacked=False))
    shardings = sharding.shardings(boxed, mesh, sharding.DECODE_RULES)
    return dataclasses.replace(model, params=jax.device_put(model.params, shardings), mesh=mesh)


@pytest.fixture(scope="module")
def reference():
    return [generation.tokens for generation in msn_jax.generate(tiny.model(), REQUESTS, "autoregressive")]


@pytest.mark.parametrize(
    ("data", "tensor", "decoder"), [(2, 2, "tr_jacobi"), (4, 2, "jacobi"), (1, 2, "tr_jacobi"), (2, 2, "draft_model")]
)
def test_decoding_on_a_mesh_equals_one_device(reference, monkeypatch, data, tensor, decoder):
    tiny.small_caches(monkeypatch, 32)
    small = tiny.model(seed=1)  # on one device, where `load` puts it
    small = dataclasses.replace(small, params=jax.device_put(small.params, jax.devices()[0]))
    draft = small if decoder == "draft_model" else None
    model = on_mesh(tiny.model(), data, tensor)
    generations = msn_jax.generate(model, REQUESTS, decoder, batch_size=4, draft=draft)
    assert [generation.tokens for generation in generations] == reference


def test_a_model_is_loaded_onto_a_mesh(tmp_path):
    tiny.write_model(tmp_path / "model", n_layers=1)
    expected = msn_jax.generate(msn_jax.load(tmp_path / "model"), REQUESTS, batch_size=4)
    model = msn_jax.load(tmp_path / "model", mesh=MeshConfig(data=4, fsdp=1, tensor=2))
    assert model.params["head"].sharding.is_equivalent_to(
        jax.NamedSharding(model.mesh, PartitionSpec(None, "tensor")), 2
    )
    generations = msn_jax.generate(model, REQUESTS, batch_size=4)
    assert [generation.tokens for generation in generations] == [generation.tokens for generation in expected]


def test_the_cache_is_sharded_over_rows_and_heads(monkeypatch):
    tiny.small_caches(monkeypatch, 32)
    decoder = Decoder(on_mesh(tiny.endless(tiny.model()), 2, 2), "tr_jacobi")
    decoding = decoder.start([[1, 9, 10]] * 3, [Request("", 30)] * 3, 4)

    def check() -> None:
        for slots in jax.tree.leaves(decoding.state.cache.layers):
            assert slots.sharding.is_equivalent_to(
                jax.NamedSharding(decoder.model.mesh, PartitionSpec("data", "tensor")), 4
            )
            assert slots.addressable_shards[0].data.shape == (2, 1, decoding.state.capacity, 8)

    check()
    capacity = decoding.state.capacity
    decoding.run(2)
    check()
    decoding.cancel([1])
    decoding.run()
    assert decoding.state.capacity > capacity
    check()


def test_a_batch_size_that_the_mesh_does_not_divide_is_refused():
    model = on_mesh(tiny.model(), 2, 2)
    with pytest.raises(InputError, match="batch_size=3: must be divisible by the 2 batch shards of the mesh"):
        msn_jax.generate(model, ["a"], batch_size=3)
    with pytest.raises(InputError, match="batch_size=1: must be divisible by the 2 batch shards of the mesh"):
        next(msn_jax.stream(model, "a"))


def test_a_session_on_a_mesh_compiles_its_decode_program_once(monkeypatch):
    tiny.small_caches(monkeypatch, 64)
    decoder = Decoder(on_mesh(tiny.endless(tiny.model()), 2, 2), "tr_jacobi")
    before = loop.decode._cache_size()
    decoding = decoder.start([[1, 9, 10]] * 3, [Request("", 30)] * 3, 4)
    for _ in range(3):
        decoding.run(2)
    decoding.cancel([1])
    decoding.run()
    assert decoding.state.capacity == 64
    assert loop.decode._cache_size() == before + 1
