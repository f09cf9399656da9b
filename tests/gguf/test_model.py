"""The config of a GGUF model, and metadata that are refused."""

import gguf_files
import numpy as np
import pytest
from gguf_files import MODELS, assert_refused, write_both
from hugging_face.families import LLAMA3

from msn_jax.config import LlamaConfig
from msn_jax.gguf import model
from msn_jax.rope import inverse_frequencies

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(
    "scaling",
    [
        LLAMA3,  # equals low 1, high 4, length 16
        {**LLAMA3, "rope_factor": 32.0, "rope_low_frequency_factor": 1.0, "rope_high_frequency_factor": 4.0}
        | {"rope_original_length": 8192},
    ],
)
def test_a_llama3_scaling_is_recognised_by_its_divisors(tmp_path, scaling):
    cfg = LlamaConfig(**MODELS["llama"] | scaling | {"rope_theta": 500_000.0, "head_dim": 64})
    path, _, _ = write_both(tmp_path, cfg)
    actual = model.load_config(path)
    assert (actual.rope_scaling, actual.rope_factor) == ("llama3", cfg.rope_factor)
    frequencies = inverse_frequencies(cfg)
    np.testing.assert_allclose(inverse_frequencies(actual), frequencies, rtol=2e-6)
    plain = inverse_frequencies(LlamaConfig(**MODELS["llama"] | {"rope_theta": 500_000.0, "head_dim": 64}))
    interpolated = (frequencies != plain) & ~np.isclose(frequencies, plain / cfg.rope_factor, rtol=1e-3)
    assert interpolated.sum() > 1


def test_other_divisors_are_refused(tmp_path, monkeypatch):
    cfg = LlamaConfig(**MODELS["llama"] | LLAMA3)
    monkeypatch.setattr(gguf_files, "rope_divisors", lambda cfg: np.linspace(1, 9, cfg.head_dim // 2, dtype=np.float32))
    path, _, _ = write_both(tmp_path, cfg)
    assert_refused(path, f"{path}: tensor 'rope_freqs.weight' has divisors that no llama3 scaling gives")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"block_count": None}, "key 'llama.block_count' is missing: must be a positive integer"),
        ({"attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon' is missing: must be a positive number"),
        ({"expert_count": 8}, "key 'llama.expert_count' is 8: must be 0: this feature is not supported"),
        ({"attention.head_count_kv": [2, 1]}, "key 'llama.attention.head_count_kv' varies by layer"),
        ({"rope.dimension_count": 8}, "key 'llama.rope.dimension_count' is 8: must be 16, the size of a head"),
        ({"rope.scaling.type": "yarn"}, "key 'llama.rope.scaling.type' is 'yarn': must be none or linear"),
        ({"attention.head_count_kv": 3}, "invalid model: config.model.n_kv_heads=3"),
        ({"block_count": 3}, "has no tensor for parameter 'layer_2/"),
        ({"block_count": 1}, "tensor 'blk.1.attn_k.weight': unexpected"),
        ({"feed_forward_length": 32}, "has shape (32, 64): the metadata imply (32, 32)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, metadata, message):
    path, _, _ = write_both(tmp_path, "llama", metadata=metadata)
    assert_refused(path, message)
