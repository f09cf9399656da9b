"""Every way to decode takes an adapter: outputs in a file, a stream, a chat; the adapter gated or merged."""

import dataclasses
import json

import commands
import pytest
import random_adapter
import random_params
import refusals
import tiny_config

import msn_jax
from msn_jax import checkpoint
from msn_jax.convert import convert
from msn_jax.data import tokenizer as tokenizers
from msn_jax.decode import models

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = dataclasses.replace(tiny_config.get_config().model, n_heads=4, n_kv_heads=2, max_length=512)
PROMPTS = ["two and five", [{"role": "user", "content": "nine and one"}]]
SETTINGS = {"decoder": "autoregressive", "max_new_tokens": 12}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with `model`, its adapters `gated` and `ungated`, and `merged`, the model with the latter merged."""
    directory = tmp_path_factory.mktemp("decoding")
    tiny_config.write_data(directory / "train.jsonl")
    checkpoint.save_model(directory / "workdir", random_params.stacked(MODEL, gain=3.0), MODEL)
    texts = (directory / "train.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizers.train(texts, MODEL.vocab_size, directory / "workdir" / "tokenizer.model")
    convert(str(directory / "workdir"), str(directory / "model"))
    random_adapter.save(directory / "gated", MODEL, gate="noise", token=7)
    random_adapter.save(directory / "ungated", MODEL)
    convert(str(directory / "model"), str(directory / "merged"), adapter=str(directory / "ungated"))
    lines = [{"prompt": PROMPTS[0]}, {"messages": PROMPTS[1]}]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def expected(directory):
    """The texts for PROMPTS of the model alone, which a gated adapter does not change, and of the merged one."""
    models = {"gated": msn_jax.load(directory / "model"), "ungated": msn_jax.load(directory / "merged")}
    texts = {kind: [one.text for one in msn_jax.generate(model, PROMPTS, **SETTINGS)] for kind, model in models.items()}
    assert all(gated != ungated for gated, ungated in zip(*texts.values(), strict=True))
    return texts


def test_an_adapter_is_attached_to_a_loaded_model(directory, expected):
    model = msn_jax.load(directory / "model")
    adapted = models.attach(model, directory / "gated")
    assert adapted.params is model.params
    assert adapted.adapter.noise_token == 7
    assert [one.text for one in msn_jax.generate(adapted, PROMPTS, "jacobi", 12)] == expected["gated"]
    loaded = msn_jax.load(directory / "model", adapter=directory / "gated")
    passes = [[one.accept_lengths for one in msn_jax.generate(m, PROMPTS, "jacobi", 12)] for m in (adapted, loaded)]
    assert passes[0] == passes[1]
    message = refusals.refusal(models.attach, model, directory / "ungated")
    assert "ungated: is active at every token" in message


@pytest.mark.parametrize("kind", ["gated", "ungated"])
@pytest.mark.parametrize("decoder", ["auto", "tr_jacobi"])
def test_streams_and_chats_decode_with_an_adapter(directory, expected, kind, decoder):
    model = msn_jax.load(directory / "model", adapter=directory / kind)
    for prompt, text in zip(PROMPTS, expected[kind], strict=True):
        chunks = list(msn_jax.stream(model, prompt, decoder=decoder, max_new_tokens=12))
        assert "".join(chunk.text for chunk in chunks) == text
    alone = msn_jax.load(directory / {"gated": "model", "ungated": "merged"}[kind])
    system = "two and five is seven. " * 12  # more than one chunk of the prefill
    chats = [
        msn_jax.Chat(model, decoder, system=system, max_new_tokens=12),
        msn_jax.Chat(alone, "autoregressive", system=system, max_new_tokens=12),
    ]
    for content in ("nine and one", "two and five"):  # the second turn continues from the cache of the first
        ours, theirs = (chat.send(content) for chat in chats)
        assert ours.tokens == theirs.tokens
    assert chats[0].num_cached_tokens > 0


def test_the_program_decodes_with_an_adapter(directory, expected):
    common = ["--model=model", "--max_new_tokens=12", "--decoder=tr_jacobi"]
    ways = [["--prompts=prompts.jsonl", "--output=out_{}.jsonl"], [f"--prompt={PROMPTS[0]}", "--stream"]]
    cases = [("gated", ways[0]), ("gated", ways[1]), ("ungated", ways[0])]
    arguments = [[*common, f"--adapter={kind}", *(flag.format(kind) for flag in way)] for kind, way in cases]
    for (kind, way), (code, out, error) in zip(
        cases, commands.run("msn_jax.generate", arguments, directory), strict=True
    ):
        assert code == 0, error
        if way is ways[0]:
            lines = (directory / f"out_{kind}.jsonl").read_text(encoding="utf-8").splitlines()
            assert [json.loads(line)["text"] for line in lines] == expected[kind]
        else:
            assert out == expected[kind][0] + "\n"
