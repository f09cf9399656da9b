"""The host side of decoding: batches, streams, cancellation, and chats that reuse the cached prefix."""

import dataclasses

import numpy as np
import pytest
import tiny

import msn_jax
from msn_jax import cpu
from msn_jax.cli import InputError
from msn_jax.decode import engine, tree
from msn_jax.decode.batch import PaddedBatch
from msn_jax.decode.engine import Decoder
from msn_jax.decode.request import Request
from msn_jax.decode.session import RequestState

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = ["the cat", [{"role": "user", "content": "sat on"}], "a", "mat " * 6, "dog sat"]
REQUESTS = [
    Request(PROMPTS[0], 9),
    Request(PROMPTS[1], 30, temperature=1.0, seed=3),
    Request(PROMPTS[2], 17, temperature=1.3, top_k=5, top_p=0.9, seed=2**40),
    Request(PROMPTS[3], 24, temperature=0.7, min_p=0.1, sample=11),  # ends with a stop token
    Request(PROMPTS[4], 1),
]


def invariant_fields(generations):
    """Fields that must not depend on batch and drafter."""
    return [
        (generation.index, generation.prompt, generation.text, generation.tokens, generation.finish_reason)
        for generation in generations
    ]


def check_bookkeeping(generation) -> None:
    assert sum(generation.accept_lengths) == generation.new_tokens == len(generation.tokens)
    assert len(generation.accept_lengths) == generation.forward_passes
    assert min(generation.accept_lengths) >= 1


def ascii_pair(text: str) -> str:
    """Two ASCII characters from the middle of `text`, for use as a stop string."""
    return next(text[at : at + 2] for at in range(len(text) // 3, len(text)) if text[at : at + 2].isascii())


@pytest.fixture(scope="module")
def alone():
    """Every request in its own batch, decoded autoregressively."""
    generations = [msn_jax.generate(tiny.model(), [request], "autoregressive")[0] for request in REQUESTS]
    return [dataclasses.replace(generation, index=index) for index, generation in enumerate(generations)]


@pytest.mark.parametrize("decoder", ["autoregressive", "tr_jacobi", "draft_model"])
def test_every_request_keeps_its_own_settings(alone, decoder):
    draft = tiny.model(seed=1) if decoder == "draft_model" else None
    for batch_size in (2, 5):
        generations = msn_jax.generate(tiny.model(), REQUESTS, decoder, batch_size=batch_size, draft=draft)
        assert invariant_fields(generations) == invariant_fields(alone)
        for generation, request in zip(generations, REQUESTS, strict=True):
            check_bookkeeping(generation)
            assert generation.new_tokens <= request.max_new_tokens
            ended = generation.tokens[-1] in tiny.tokenizer().stop_ids
            assert ended or generation.new_tokens == request.max_new_tokens
            assert generation.finish_reason == ("eos" if ended else "length")
            start = not isinstance(request.prompt, str)
            assert generation.text == tiny.tokenizer().decode(generation.tokens, start=start)
        assert {generation.finish_reason for generation in generations} == {"eos", "length"}


def test_repeated_prompts_of_a_list_are_numbered_samples():
    requests = [dataclasses.replace(Request("the cat", 12, temperature=1.0, seed=4), sample=i) for i in range(3)]
    expected = msn_jax.generate(tiny.model(), ["the cat"] * 3, max_new_tokens=12, temperature=1.0, seed=4)
    generations = msn_jax.generate(tiny.model(), requests)
    assert invariant_fields(generations) == invariant_fields(expected)
    assert len({generation.text for generation in generations}) == 3


def test_stop_strings_end_rows_of_a_batch(alone):
    """Three rows have a stop string of their own, taken from their output without it; the others are unaffected."""
    requests, expected = [], []
    for request, whole in zip(REQUESTS, alone, strict=True):
        stop = () if whole.index in (0, 4) else (ascii_pair(whole.text), "never generated")
        requests.append(dataclasses.replace(request, stop=stop))
        expected.append(whole.text[: whole.text.index(stop[0])] if stop else whole.text)
    for batch_size in (1, 2, 5):
        generations = msn_jax.generate(tiny.model(), requests, "tr_jacobi", batch_size=batch_size)
        assert [generation.text for generation in generations] == expected
        for generation, whole, request in zip(generations, alone, requests, strict=True):
            check_bookkeeping(generation)
            assert generation.finish_reason == ("stop" if request.stop else whole.finish_reason)
            assert generation.tokens == whole.tokens[: generation.new_tokens]
            start = not isinstance(request.prompt, str)
            before, text = (tiny.tokenizer().decode(generation.tokens[:end], start=start) for end in (-1, None))
            assert not request.stop or (request.stop[0] in text and request.stop[0] not in before)


def test_finish_reasons(alone):
    """With a generated token as the stop token: eos, then a stop string and a length limit that end it earlier."""
    whole = alone[1]
    end = next(token for token in whole.tokens[5:] if token not in whole.tokens[:5])
    num_before = whole.tokens.index(end)
    model = dataclasses.replace(tiny.model(), tokenizer=dataclasses.replace(tiny.tokenizer(), stop_ids=(end, 2)))
    [ended] = msn_jax.generate(model, [REQUESTS[1]])
    assert (ended.finish_reason, ended.tokens) == ("eos", whole.tokens[: num_before + 1])
    assert ended.text == tiny.tokenizer().decode(whole.tokens[:num_before])
    check_bookkeeping(ended)
    [stopped] = msn_jax.generate(model, [dataclasses.replace(REQUESTS[1], stop=(ended.text[2:4],))])
    assert (stopped.finish_reason, stopped.text) == ("stop", ended.text[:2])
    [truncated] = msn_jax.generate(model, [dataclasses.replace(REQUESTS[1], max_new_tokens=num_before)])
    assert (truncated.finish_reason, truncated.tokens) == ("length", whole.tokens[:num_before])


def test_cancelling_a_row_does_not_affect_the_others(alone):
    decoder = Decoder(tiny.model(), "tr_jacobi")
    requests = [dataclasses.replace(request, max_new_tokens=24) for request in REQUESTS[:4]]
    encoded = [engine.encode(decoder, request, "here") for request in requests]
    decoding = decoder.start(encoded, requests, 6)  # two rows of the batch are unused
    assert decoding.run(3)
    decoding.cancel([1])
    before = len(decoding.output_tokens()[1][0])
    assert not decoding.run()
    assert len(decoding.output_tokens()[1][0]) == before < 24
    whole = msn_jax.generate(tiny.model(), requests, "autoregressive")
    assert [decoding.output_tokens()[row][0] for row in (0, 2, 3)] == [whole[row].tokens for row in (0, 2, 3)]
    assert decoding.output_tokens()[1][0] == whole[1].tokens[:before]


def test_forward_passes_are_counted_across_growth(monkeypatch):
    tiny.small_caches(monkeypatch, 16)
    decoder = Decoder(tiny.endless(tiny.model()), "autoregressive")
    decoding = decoder.start([[1, 9, 10]], [Request("", 40)], 1)
    for passes in range(5, 40, 5):
        assert decoding.run(5)
        assert len(decoding.output_tokens()[0][0]) == passes
    assert decoding.state.capacity >= 38


@pytest.mark.parametrize("decoder", ["jacobi", "draft_model"])
def test_buckets_that_grow_change_no_output(alone, monkeypatch, decoder):
    tiny.small_caches(monkeypatch, 16)
    draft = tiny.model(seed=1) if decoder == "draft_model" else None
    generations = msn_jax.generate(tiny.model(), REQUESTS, decoder, batch_size=5, draft=draft)
    assert invariant_fields(generations) == invariant_fields(alone)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("stop", [(), ("never generated",)])
def test_the_chunks_of_a_stream_add_up_to_the_generation(alone, passes, stop):
    request = dataclasses.replace(REQUESTS[1], stop=stop)
    *chunks, last = msn_jax.stream(tiny.model(), request, passes=passes)
    assert invariant_fields([last.generation]) == invariant_fields([dataclasses.replace(alone[1], index=0)])
    assert "".join(chunk.text for chunk in [*chunks, last]) == last.generation.text
    assert [token for chunk in [*chunks, last] for token in chunk.tokens] == last.generation.tokens
    assert all(chunk.generation is None for chunk in chunks)
    if passes == 1:
        assert [len(chunk.tokens) for chunk in [*chunks, last]] == last.generation.accept_lengths


def test_a_stream_ends_at_its_stop_string(alone):
    stop = ascii_pair(alone[1].text)
    chunks = list(msn_jax.stream(tiny.model(), PROMPTS[1], temperature=1.0, seed=3, max_new_tokens=30, stop=stop))
    assert "".join(chunk.text for chunk in chunks) == alone[1].text[: alone[1].text.index(stop)]
    assert [token for chunk in chunks for token in chunk.tokens] == chunks[-1].generation.tokens
    assert chunks[-1].generation.finish_reason == "stop"


def test_incomplete_characters_are_held_back():
    tokens = tiny.tokenizer().encode("€", start=False)
    row = RequestState(tiny.model(), Request("the"))
    assert [row.append([token], [1], done=False) for token in tokens] == ["", "", "€"]
    assert (row.tokens, row.accept_lengths) == (tokens, [1, 1, 1])


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "sampled"])
def test_a_chat_turn_equals_generating_from_all_its_messages(monkeypatch, settings):
    monkeypatch.setattr(cpu, "_PREFILL_CHUNK", 8)
    chat = msn_jax.Chat(tiny.model(), system="be kind", max_new_tokens=12, **settings)
    num_cached = []
    for content in ("the cat", "sat on the mat", "and?"):
        messages = [*chat.messages, {"role": "user", "content": content}]
        request = Request(messages, 12, sample=len(messages), **settings)
        expected = msn_jax.generate(tiny.model(), [request], "autoregressive")[0]
        generation = chat.send(content)
        assert invariant_fields([generation]) == invariant_fields([expected])
        assert chat.messages == [*messages, {"role": "assistant", "content": generation.text}]
        num_cached.append(chat.num_cached_tokens)
    assert num_cached[0] == 0
    assert num_cached[2] > num_cached[1] > 0
    assert all(number % 8 == 0 for number in num_cached)


def test_the_common_prefix_is_reused_in_whole_chunks(monkeypatch):
    """If cached prefix and prompt differ from token 11 on, the first chunk of 8 tokens is reused."""
    monkeypatch.setattr(cpu, "_PREFILL_CHUNK", 8)
    decoder = Decoder(tiny.model(), "tr_jacobi")
    request = Request("", 20)

    def decode(prompt, prefix=None):
        decoding = decoder.start([prompt], [request], 1, prefix)
        decoding.run()
        return decoding, decoding.output_tokens()[0][0]

    first, _ = decode(list(range(10, 40)))
    for num_common, num_cached in [(11, 8), (3, 0), (29, 24), (40, 24)]:
        prompt = [*range(10, 10 + min(num_common, 30)), *[5] * (30 - num_common), 6, 7][:32]
        again, new_tokens = decode(prompt, first.prefix())
        assert again.num_cached_tokens == num_cached
        assert new_tokens == decode(prompt)[1]
    again, _ = decode(list(range(10, 19)), first.prefix())  # shorter than the cached prefix
    assert again.num_cached_tokens == 8


def test_a_cancelled_turn_leaves_no_message():
    chat = msn_jax.Chat(tiny.model(), max_new_tokens=12)
    stream = chat.stream("the cat")
    next(stream)
    stream.close()
    assert chat.messages == []
    expected = msn_jax.generate(tiny.model(), [[{"role": "user", "content": "sat"}]], max_new_tokens=12)[0]
    assert chat.send("sat").tokens == expected.tokens


def test_a_second_turn_is_refused_while_one_is_streaming():
    chat = msn_jax.Chat(tiny.model(), max_new_tokens=12)
    first = chat.stream("the cat")
    next(first)
    with pytest.raises(InputError, match="chat: another turn is still streaming"):
        next(chat.stream("dog sat"))
    *_, last = first
    assert [message["content"] for message in chat.messages] == ["the cat", last.generation.text]
    done = chat.stream("dog sat")
    while next(done).generation is None:  # complete, though its iterator is not exhausted
        pass
    second = chat.stream("a")
    next(second)
    done.close()
    with pytest.raises(InputError, match="chat: another turn is still streaming"):
        chat.send("mat")
    second.close()
    assert chat.send("mat").new_tokens > 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value, temperature):
    model = tiny.model()
    broken = dataclasses.replace(
        model, params={**model.params, "norm": {"scale": model.params["norm"]["scale"] * value}}
    )
    for decoder in ("autoregressive", "tr_jacobi"):
        with pytest.raises(
            InputError, match=r"model: the logits, computed in float32, are not finite; check the checkpoint$"
        ):
            msn_jax.generate(broken, ["the cat", "a"], decoder, temperature=temperature, batch_size=2)


def test_a_turn_is_stored_with_its_last_chunk():
    chat = msn_jax.Chat(tiny.model(), max_new_tokens=12)
    generation = next(chunk.generation for chunk in chat.stream("the cat") if chunk.generation is not None)
    assert [message["content"] for message in chat.messages] == ["the cat", generation.text]


@pytest.mark.parametrize("passes", [0, -1])
def test_a_stream_needs_at_least_one_pass_per_chunk(passes):
    with pytest.raises(InputError, match=f"passes={passes}: must be at least 1"):
        msn_jax.stream(tiny.model(), "a", passes=passes)


def test_invalid_settings_are_refused_before_decoding():
    for settings, field in [({"temperature": -1.0}, "temperature"), ({"stop": ""}, "stop"), ({"top_p": 0}, "top_p")]:
        with pytest.raises(InputError, match=field):
            msn_jax.Chat(tiny.model(), **settings)
        with pytest.raises(InputError, match=field):
            msn_jax.stream(tiny.model(), "a", **settings)
    with pytest.raises(InputError, match="tree: has jacobi nodes"):
        msn_jax.Chat(tiny.model(), "prompt_lookup", tree.chain(tree.JACOBI, 1))


def test_large_models_prefill_long_prompts_in_larger_chunks():
    chunks = {slots: cpu.prefill_chunk(slots, 1, is_large=True) for slots in (64, 256, 512, 1024, 4096)}
    assert chunks == {64: 64, 256: 64, 512: 128, 1024: 256, 4096: 256}
    assert [cpu.prefill_chunk(4096, batch_size, is_large=True) for batch_size in (2, 3, 24, 1000)] == [128, 64, 64, 64]
    assert {cpu.prefill_chunk(slots, 1, is_large=False) for slots in chunks} == {64}


def test_chunks_of_any_size_give_the_same_output(monkeypatch):
    model = dataclasses.replace(tiny.model(max_length=2048), experience={})
    decoder = Decoder(model, "tr_jacobi")
    request = Request("the cat sat on the mat " * 60, 20)
    ids = engine.encode(decoder, request, "prompt")

    def chunk():
        return PaddedBatch(model, decoder.drafter, [ids], [request], 1).chunk

    [expected], small = engine.generate(model, [request], "tr_jacobi"), chunk()
    monkeypatch.setattr(cpu, "_CACHE_BYTES", 0)
    [output] = engine.generate(model, [request], "tr_jacobi")
    assert output.tokens == expected.tokens
    assert chunk() > small
