"""The host's part: batches, streams, cancellation, and chats that go on from what the cache knows."""

import dataclasses

import numpy as np
import pytest
import tiny

import msn_jax
from msn_jax import cpu
from msn_jax.cli import InputError
from msn_jax.decode import engine, tree
from msn_jax.decode.engine import Decoder
from msn_jax.decode.request import Request
from msn_jax.decode.session import RequestState

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = ["the cat", [{"role": "user", "content": "sat on"}], "a", "mat " * 6, "dog sat"]
REQUESTS = [
    Request(PROMPTS[0], 9),
    Request(PROMPTS[1], 30, temperature=1.0, seed=3),
    Request(PROMPTS[2], 17, temperature=1.3, top_k=5, top_p=0.9, seed=2**40),
    Request(PROMPTS[3], 24, temperature=0.7, min_p=0.1, sample=7),
    Request(PROMPTS[4], 1),
]


def settled(generations):
    """What must not depend on batches and drafters."""
    return [(one.index, one.prompt, one.text, one.tokens, one.finish_reason) for one in generations]


def check_accounts(generation) -> None:
    assert sum(generation.accept_lengths) == generation.new_tokens == len(generation.tokens)
    assert len(generation.accept_lengths) == generation.forward_passes
    assert min(generation.accept_lengths) >= 1


def readable(text: str) -> str:
    """Two characters of the middle of a text, that are whole."""
    return next(text[at : at + 2] for at in range(len(text) // 3, len(text)) if text[at : at + 2].isascii())


@pytest.fixture(scope="module")
def alone():
    """Every request in a batch of its own, one token a pass."""
    answers = [msn_jax.generate(tiny.model(), [request], "autoregressive")[0] for request in REQUESTS]
    return [dataclasses.replace(answer, index=index) for index, answer in enumerate(answers)]


@pytest.mark.parametrize("decoder", ["autoregressive", "tr_jacobi", "draft_model"])
def test_every_request_has_its_own_settings(alone, decoder):
    draft = tiny.model(seed=1) if decoder == "draft_model" else None
    for batch_size in (2, 5):
        answers = msn_jax.generate(tiny.model(), REQUESTS, decoder, batch_size=batch_size, draft=draft)
        assert settled(answers) == settled(alone)
        for answer, request in zip(answers, REQUESTS, strict=True):
            check_accounts(answer)
            assert answer.new_tokens <= request.max_new_tokens
            at_the_end = answer.tokens[-1] in tiny.tokenizer().stop_ids
            assert at_the_end or answer.new_tokens == request.max_new_tokens
            assert answer.finish_reason == ("eos" if at_the_end else "length")
            assert answer.text == tiny.tokenizer().decode(answer.tokens, start=not isinstance(request.prompt, str))
        assert {answer.finish_reason for answer in answers} == {"eos", "length"}


def test_requests_of_a_list_are_its_samples():
    texts = [dataclasses.replace(Request("the cat", 12, temperature=1.0, seed=4), sample=i) for i in range(3)]
    of_list = msn_jax.generate(tiny.model(), ["the cat"] * 3, max_new_tokens=12, temperature=1.0, seed=4)
    answers = msn_jax.generate(tiny.model(), texts)
    assert settled(answers) == settled(of_list)
    assert len({answer.text for answer in answers}) == 3


def test_stop_strings_end_rows_of_a_batch(alone):
    """Each row at a text of its own, taken from what it says without; the others do not notice."""
    requests, expected = [], []
    for request, answer in zip(REQUESTS, alone, strict=True):
        stop = () if answer.index in (0, 4) else (readable(answer.text), "never said")
        requests.append(dataclasses.replace(request, stop=stop))
        expected.append(answer.text[: answer.text.index(stop[0])] if stop else answer.text)
    for batch_size in (1, 3, 5):
        answers = msn_jax.generate(tiny.model(), requests, "tr_jacobi", batch_size=batch_size)
        assert [answer.text for answer in answers] == expected
        for answer, whole, request in zip(answers, alone, requests, strict=True):
            check_accounts(answer)
            assert answer.finish_reason == ("stop" if request.stop else whole.finish_reason)
            assert answer.tokens == whole.tokens[: answer.new_tokens]
            start = not isinstance(request.prompt, str)
            said = [tiny.tokenizer().decode(answer.tokens[:end], start=start) for end in (-1, None)]
            assert not request.stop or (request.stop[0] in said[1] and request.stop[0] not in said[0])


def test_finish_reasons(alone):
    """A token that is said is made the end; a stop string before it comes first."""
    whole = alone[1]
    end = next(token for token in whole.tokens[5:] if token not in whole.tokens[:5])
    at = whole.tokens.index(end)
    model = dataclasses.replace(tiny.model(), tokenizer=dataclasses.replace(tiny.tokenizer(), stop_ids=(end, 2)))
    [answer] = msn_jax.generate(model, [REQUESTS[1]])
    assert (answer.finish_reason, answer.tokens) == ("eos", whole.tokens[: at + 1])
    assert answer.text == tiny.tokenizer().decode(whole.tokens[:at])
    check_accounts(answer)
    [stopped] = msn_jax.generate(model, [dataclasses.replace(REQUESTS[1], stop=(answer.text[2:4],))])
    assert (stopped.finish_reason, stopped.text) == ("stop", answer.text[:2])
    [cut] = msn_jax.generate(model, [dataclasses.replace(REQUESTS[1], max_new_tokens=at)])
    assert (cut.finish_reason, cut.tokens) == ("length", whole.tokens[:at])


def test_a_cancelled_row_ends_and_the_others_do_not_notice(alone):
    decoder = Decoder(tiny.model(), "tr_jacobi")
    requests = [dataclasses.replace(request, max_new_tokens=24) for request in REQUESTS[:4]]
    encoded = [engine.encode(decoder, request, "here") for request in requests]
    decoding = decoder.start(encoded, requests, 6)  # two rows are idle
    assert decoding.run(3)
    decoding.cancel([1])
    before = len(decoding.new_tokens()[1][0])
    assert not decoding.run()
    assert len(decoding.new_tokens()[1][0]) == before < 24
    whole = msn_jax.generate(tiny.model(), requests, "autoregressive")
    assert [decoding.new_tokens()[row][0] for row in (0, 2, 3)] == [whole[row].tokens for row in (0, 2, 3)]
    assert decoding.new_tokens()[1][0] == whole[1].tokens[:before]


def test_passes_are_counted_across_growth(monkeypatch):
    tiny.small_caches(monkeypatch, 8)
    decoder = Decoder(tiny.endless(tiny.model()), "autoregressive")
    decoding = decoder.start([[1, 9, 10]], [Request("", 40)], 1)
    for passes in range(5, 40, 5):
        assert decoding.run(5)
        assert len(decoding.new_tokens()[0][0]) == passes
    assert decoding.state.capacity >= 38


@pytest.mark.parametrize("decoder", ["jacobi", "draft_model"])
def test_buckets_grow_with_the_text(alone, monkeypatch, decoder):
    tiny.small_caches(monkeypatch, 8)
    draft = tiny.model(seed=1) if decoder == "draft_model" else None
    answers = msn_jax.generate(tiny.model(), REQUESTS, decoder, batch_size=5, draft=draft)
    assert settled(answers) == settled(alone)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("stop", [(), ("never said",)])
def test_the_pieces_of_a_stream_are_the_answer(alone, passes, stop):
    request = dataclasses.replace(REQUESTS[1], stop=stop)
    *pieces, last = msn_jax.stream(tiny.model(), request, passes=passes)
    assert settled([last.generation]) == settled([dataclasses.replace(alone[1], index=0)])
    assert "".join(piece.text for piece in [*pieces, last]) == last.generation.text
    assert [token for piece in [*pieces, last] for token in piece.tokens] == last.generation.tokens
    assert all(piece.generation is None for piece in pieces)
    if passes == 1:
        assert [len(piece.tokens) for piece in [*pieces, last]] == last.generation.accept_lengths


def test_a_stream_ends_at_its_stop_string(alone):
    stop = readable(alone[1].text)
    pieces = list(msn_jax.stream(tiny.model(), PROMPTS[1], temperature=1.0, seed=3, max_new_tokens=30, stop=stop))
    assert "".join(piece.text for piece in pieces) == alone[1].text[: alone[1].text.index(stop)]
    assert [token for piece in pieces for token in piece.tokens] == pieces[-1].generation.tokens
    assert pieces[-1].generation.finish_reason == "stop"


def test_half_a_character_waits_for_its_other_half():
    tokens = tiny.tokenizer().encode("€", start=False)
    row = RequestState(tiny.model(), Request("the"))
    assert [row.append(tokens[:end], [1] * end, done=False) for end in (1, 2, 3)] == ["", "", "€"]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "sampled"])
def test_a_chat_says_what_its_messages_would_get(monkeypatch, settings):
    monkeypatch.setattr(cpu, "PREFILL_CHUNK", 8)
    chat = msn_jax.Chat(tiny.model(), system="be kind", max_new_tokens=12, **settings)
    reused = []
    for said in ("the cat", "sat on the mat", "and?"):
        messages = [*chat.messages, {"role": "user", "content": said}]
        request = Request(messages, 12, sample=len(messages), **settings)
        expected = msn_jax.generate(tiny.model(), [request], "autoregressive")[0]
        answer = chat.send(said)
        assert settled([answer]) == settled([expected])
        assert chat.messages == [*messages, {"role": "assistant", "content": answer.text}]
        reused.append(chat.num_cached_tokens)
    assert reused[0] == 0
    assert reused[2] > reused[1] > 0
    assert all(number % 8 == 0 for number in reused)


def test_what_is_reused_is_what_is_the_same(monkeypatch):
    """A prefix that differs from the prompt at its token number 11 gives the chunk before."""
    monkeypatch.setattr(cpu, "PREFILL_CHUNK", 8)
    decoder = Decoder(tiny.model(), "tr_jacobi")
    request = Request("", 20)

    def tokens(prompt, prefix=None):
        decoding = decoder.start([prompt], [request], 1, prefix)
        decoding.run()
        return decoding, decoding.new_tokens()[0][0]

    first, _ = tokens(list(range(10, 40)))
    for changed, reused in [(11, 8), (3, 0), (29, 24), (40, 24)]:
        prompt = [*range(10, 10 + min(changed, 30)), *[5] * (30 - changed), 6, 7][:32]
        again, found = tokens(prompt, first.prefix())
        assert again.num_cached_tokens == reused
        assert found == tokens(prompt)[1]
    again, _ = tokens(list(range(10, 19)), first.prefix())  # shorter than what is known
    assert again.num_cached_tokens == 8


def test_a_cancelled_turn_is_forgotten():
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
def test_logits_that_are_not_finite_end_a_decode(value, temperature):
    model = tiny.model()
    broken = dataclasses.replace(
        model, params={**model.params, "norm": {"scale": model.params["norm"]["scale"] * value}}
    )
    for decoder in ("autoregressive", "tr_jacobi"):
        with pytest.raises(InputError, match="model: its logits are not finite in float32"):
            msn_jax.generate(broken, ["the cat", "a"], decoder, temperature=temperature, batch_size=2)


def test_a_turn_is_remembered_with_its_last_piece():
    chat = msn_jax.Chat(tiny.model(), max_new_tokens=12)
    answer = next(piece.generation for piece in chat.stream("the cat") if piece.generation is not None)
    assert [message["content"] for message in chat.messages] == ["the cat", answer.text]


@pytest.mark.parametrize("passes", [0, -1])
def test_a_stream_needs_passes(passes):
    with pytest.raises(InputError, match=f"passes={passes}: must be at least 1"):
        msn_jax.stream(tiny.model(), "a", passes=passes)


def test_settings_that_cannot_be_are_refused_before_anything_is_said():
    for settings, said in [({"temperature": -1.0}, "temperature"), ({"stop": ""}, "stop"), ({"top_p": 0}, "top_p")]:
        with pytest.raises(InputError, match=said):
            msn_jax.Chat(tiny.model(), **settings)
        with pytest.raises(InputError, match=said):
            msn_jax.stream(tiny.model(), "a", **settings)
    with pytest.raises(InputError, match="tree: has jacobi nodes"):
        msn_jax.Chat(tiny.model(), "prompt_lookup", tree.chain(tree.JACOBI, 1))
