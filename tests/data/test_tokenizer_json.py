import io
import json
import shutil

import chat_examples
import pytest
import sentencepiece
import tiny_config
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from msn_jax import train
from msn_jax.cli import InputError
from msn_jax.data import chat
from msn_jax.data import tokenizer as tokenizer_lib

CHATML = chat_examples.unmarked(chat_examples.CHATML)
AWKWARD = st.sampled_from([*" \u2581\0\n\t\r<>|ax4é\ufffd\ufeff\U0001f600", "<s>", "</s", "<|im_end|>", "hello", "  "])
TEXT = st.text() | st.lists(AWKWARD).map("".join)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    directory = tmp_path_factory.mktemp("byte_level")
    chat_examples.write_directory(directory, CHATML)
    return tokenizer_lib.load(directory)


def llama_style() -> tokenizers.Tokenizer:
    """Byte fallback and a dummy prefix, as Llama 2 and Mistral have it."""
    words = [*"\u2581abcdefghijklmnopqrstuvwxyz", "he", "ll", "hell", "hello", "\u2581hello", "\u2581\u2581"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u2581", "hello"), ("\u2581", "\u2581")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace_style() -> tokenizers.Tokenizer:
    tokenizer = llama_style()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return tokenizer


@pytest.fixture(scope="module", params=[llama_style, metaspace_style])
def prefixed(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("prefixed")
    write(directory, request.param().to_str(), {"bos_token": "<s>", "eos_token": "</s>"})
    return tokenizer_lib.load(directory)


def write(directory, tokenizer=None, tokenizer_config=None, **files):
    directory.mkdir(exist_ok=True)
    if tokenizer is not None:
        (directory / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    for name, content in {"tokenizer_config": tokenizer_config, **files}.items():
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def refusal(directory):
    with pytest.raises(InputError) as caught:
        tokenizer_lib.load(directory)
    assert str(caught.value).startswith(str(directory)) and "\n" not in str(caught.value)
    return str(caught.value).removeprefix(str(directory))


# --- Texts


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(TEXT, min_size=1, max_size=3))
def test_any_text_comes_back_in_one_piece_or_several(byte_level, parts):
    assume(not any(special in part for part in parts for special in chat_examples.SPECIAL_TOKENS))  # without text
    ids = [i for n, part in enumerate(parts) for i in byte_level.encode(part, start=n == 0)]
    assert byte_level.decode(ids) == "".join(parts)
    assert max(ids, default=0) < byte_level.vocab_size


@settings(max_examples=200, deadline=None)
@given(first=st.lists(AWKWARD, min_size=1).map("".join), second=st.lists(AWKWARD).map("".join))
def test_a_continuation_adds_and_takes_no_space(prefixed, first, second):
    first, second = (text.replace("\u2581", "") for text in ("a" + first, second))
    assume(not any(special in text for text in (first, second) for special in ("<s>", "</s>")))
    ids, more = prefixed.encode(first), prefixed.encode(second, start=False)
    assert prefixed.decode(ids + more) == first + second
    assert prefixed.decode(more, start=False) == second


def test_a_dummy_prefix(prefixed):
    hello = prefixed.backend.token_to_id("\u2581hello")
    assert prefixed.encode("hello") == [hello]
    assert prefixed.encode("hello", start=False) == [prefixed.backend.token_to_id("hello")]
    assert (prefixed.decode([hello]), prefixed.decode([hello], start=False)) == ("hello", " hello")


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(-2, 500)))
def test_any_ids_decode(byte_level, prefixed, ids):
    for tokenizer in (byte_level, prefixed):
        for start in (True, False):
            text = tokenizer.decode(ids, start)
            assert text.encode("utf-8").decode("utf-8") == text


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 290)))
def test_decoding_is_the_librarys(byte_level, ids):
    full = tokenizers.Tokenizer.from_str(byte_level.files["tokenizer.json"].decode())
    assert byte_level.decode(ids) == full.decode(ids, skip_special_tokens=True)


def test_decode_of_unknown_ids_and_half_characters(byte_level):
    a, (first, *_) = byte_level.encode("a"), byte_level.encode("日")
    assert byte_level.decode([0, *a, 1, first]) == "a\ufffd"
    assert byte_level.decode([*a, 10**9, -1, *a]) == "a\ufffd\ufffda"
    assert byte_level.decode(byte_level.encode("a\ud800b")) == "a\ufffdb"


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_spans_cover_the_text(byte_level, prefixed, text):
    for tokenizer in (byte_level, prefixed):
        ids, spans = tokenizer.encode_with_spans(text)
        assert ids == tokenizer.encode(text) and len(ids) == len(spans)
        position = 0
        for begin, end in spans:
            assert position - 1 <= begin <= position <= max(end, position)  # a character may be several tokens
            position = max(end, position)
        assert position == len(text)


def test_the_record_of_a_prompt(prefixed):
    tokens, response_mask = chat.encode_record(prefixed, {"prompt": "hello", "response": " hello"})
    hello = prefixed.backend.token_to_id("\u2581hello")
    assert tokens.tolist() == [1, hello, hello, 2]
    assert response_mask.tolist() == [False, False, True, True]
    assert chat.encode_prompt(prefixed, "hello") == [1, hello]  # without the </s> of the post-processor


# --- What the files say


@pytest.mark.parametrize(
    ("config", "start_ids"),
    [
        ({}, (1,)),
        ({"add_bos_token": False}, ()),
        ({"add_bos_token": True, "bos_token": {"content": "<s>", "lstrip": False}}, (1,)),
        ({"add_bos_token": True, "bos_token": None}, ()),
    ],
)
def test_the_beginning_of_a_text(tmp_path, config, start_ids):
    write(tmp_path, llama_style().to_str(), {"bos_token": "<s>", "eos_token": "</s>", **config})
    assert tokenizer_lib.load(tmp_path).start_ids == start_ids
    plain = json.loads(llama_style().to_str())
    plain["post_processor"] = None
    write(tmp_path, json.dumps(plain))
    assert tokenizer_lib.load(tmp_path).start_ids == (start_ids if "add_bos_token" in config else ())


@pytest.mark.parametrize(
    ("files", "stop_ids"),
    [
        ({"tokenizer_config": {"eos_token": "</s>"}}, (1,)),
        ({"tokenizer_config": {"eos_token": "</s>"}, "generation_config": {"eos_token_id": [3, 1]}}, (1, 3)),
        ({"tokenizer_config": {"eos_token": "</s>"}, "generation_config": {"eos_token_id": 3}}, (1, 3)),
        ({"generation_config": {"eos_token_id": [3, 6]}, "config": {"eos_token_id": 0}}, (3, 6)),
        ({"config": {"eos_token_id": [6, 3]}}, (6, 3)),
        (
            {"special_tokens_map": {"eos_token": {"content": "<|eot_id|>"}}, "tokenizer_config": {"eos_token": None}},
            (6,),
        ),
    ],
)
def test_the_end_of_a_text(tmp_path, files, stop_ids):
    write(tmp_path, chat_examples.small_tokenizer().to_str(), **files)
    tokenizer = tokenizer_lib.load(tmp_path)
    assert (tokenizer.stop_ids, tokenizer.eos_id) == (stop_ids, stop_ids[0])
    tokenizer_lib.save(tokenizer, tmp_path / "copy")
    assert tokenizer_lib.load(tmp_path / "copy").stop_ids == stop_ids  # without config.json
    assert not (tmp_path / "copy" / "config.json").exists()


def test_added_tokens_of_other_files(tmp_path):
    size = chat_examples.small_tokenizer().get_vocab_size()
    decoder = {
        str(size): {"content": "<tool>", "special": True},
        str(size + 1): {"content": "<plain>", "special": False},
        "1": {"content": "</s>", "special": True},
    }
    config = {"eos_token": "</s>", "pad_token": "<nowhere>", "added_tokens_decoder": decoder}
    write(tmp_path, chat_examples.small_tokenizer().to_str(), config, added_tokens={"<more>": size + 2, "</s>": 1})
    tokenizer = tokenizer_lib.load(tmp_path)
    assert tokenizer.vocab_size == size + 3
    ids = tokenizer.encode("a<tool><plain><more><nowhere>")
    assert ids[1:4] == [size, size + 1, size + 2]
    assert tokenizer.decode(ids) == "a<plain><more><nowhere>"


def test_a_named_special_token_of_the_vocabulary_is_one(tmp_path):
    plain = json.loads(chat_examples.small_tokenizer().to_str())
    plain["added_tokens"] = []
    write(tmp_path, json.dumps(plain), {"eos_token": "</s>", "additional_special_tokens": ["<|im_end|>"]})
    tokenizer = tokenizer_lib.load(tmp_path)
    assert tokenizer.encode("a</s><|im_end|>")[1:] == [1, 3] and tokenizer.decode([1, 3]) == ""
    assert 0 not in tokenizer.encode("<s>")


def test_spans_are_not_trimmed(tmp_path):
    trimming = chat_examples.small_tokenizer()
    trimming.post_processor = processors.ByteLevel(trim_offsets=True)
    write(tmp_path, trimming.to_str(), {"eos_token": "</s>"})
    assert tokenizer_lib.load(tmp_path).encode_with_spans("a b")[1] == [(0, 1), (1, 2), (2, 3)]


def test_which_template(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "this"}]
    for template, source in (("this", "this"), (named, "this"), (named[:1], "tools"), (None, None)):
        chat_examples.write_directory(tmp_path, template)
        found = tokenizer_lib.load(tmp_path).template
        assert (found and found.source) == source
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}é", encoding="utf-8")
    assert tokenizer_lib.load(tmp_path).template.render([], False) == "</s>é"
    chat_examples.write_directory(tmp_path, "other")
    assert tokenizer_lib.load(tmp_path).template.render([], False) == "</s>é"


def test_files_are_kept_as_they_were(tmp_path):
    chat_examples.write_directory(tmp_path / "source", CHATML, note="é")
    (tmp_path / "source" / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    (tmp_path / "source" / "additional_chat_templates").mkdir()
    (tmp_path / "source" / "additional_chat_templates" / "tools.jinja").write_text("x", encoding="utf-8")
    (tmp_path / "source" / "weights.bin").write_bytes(b"no part of a tokenizer")
    target = tmp_path / "target"
    tokenizer_lib.train(["some text " * 40], 272, target / "tokenizer.model")  # of another run
    tokenizer_lib.save(tokenizer_lib.load(tmp_path / "source"), target)
    (tmp_path / "source" / "weights.bin").unlink()
    contents = [
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "source", target)
    ]
    assert contents[0] == contents[1] and len(contents[0]) == 4


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "{}", "/tokenizer.json: not a tokenizer of the library tokenizers, or damaged"),
        ("tokenizer.json", "", "/tokenizer.json: not a tokenizer of the library tokenizers, or damaged"),
        ("tokenizer_config.json", "{", "/tokenizer_config.json: line 1: broken JSON (Exp"),
        ("tokenizer_config.json", "[]", "/tokenizer_config.json: must hold a JSON object, not list"),
        ("tokenizer_config.json", "{}", "/tokenizer.json: no end of sequence"),
        ("tokenizer_config.json", '{"eos_token": 7}', "/tokenizer_config.json: eos_token: found 7"),
        ("tokenizer_config.json", '{"chat_template": 7}', "/tokenizer_config.json: chat_template: found int"),
        ("tokenizer_config.json", '{"chat_template": [7]}', "/tokenizer_config.json: chat_template: a list needs"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', ": malformed added tokens"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"9": {"content": 5}}}',
            "/tokenizer_config.json: added token 9",
        ),
        (
            "tokenizer_config.json",
            '{"additional_special_tokens": 5}',
            "/tokenizer_config.json: additional_special_tokens: needs a list",
        ),
        ("generation_config.json", '{"eos_token_id": 4294967296}', "/generation_config.json: eos_token_id: found"),
        ("added_tokens.json", '{"<q>": 1e400}', ": malformed added tokens"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "a", "template": ""}, {"name": "b", "template": ""}]}',
            "/tokenizer_config.json: chat_template: none of a, b is named 'default'",
        ),
        ("generation_config.json", '{"eos_token_id": "x"}', "/generation_config.json: eos_token_id: found 'x'"),
        ("generation_config.json", '{"eos_token_id": [true]}', "/generation_config.json: eos_token_id: found [True]"),
        ("config.json", "no", "/config.json: line 1: broken JSON (Exp"),
    ],
)
def test_malformed_files_are_named(tmp_path, name, content, said):
    chat_examples.write_directory(tmp_path, CHATML)
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert refusal(tmp_path).startswith(said)


def test_a_directory_without_tokenizer(tmp_path):
    assert refusal(tmp_path) == ": no tokenizer here, neither tokenizer.json nor tokenizer.model"
    assert refusal(tmp_path / "none") == ": cannot read the tokenizer: No such file or directory"
    write(tmp_path, llama_style().to_str())
    assert "name its directory" in refusal(tmp_path / "tokenizer.json")


# --- SentencePiece models with files beside them


@pytest.fixture(scope="module")
def sentencepiece_model():
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world, what is it?", "I INST [x] user system"] * 40),
        model_writer=proto,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return proto.getvalue()


@pytest.fixture
def load_model(tmp_path, sentencepiece_model):
    def load(tokenizer_config=None, **files):
        write(tmp_path, tokenizer_config=tokenizer_config, **files)
        (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
        return tokenizer_lib.load(tmp_path)

    return load


def test_a_model_alone(load_model, tmp_path):
    tokenizer = load_model()
    assert (tokenizer.start_ids, tokenizer.stop_ids, tokenizer.template) == ((1,), (2,), None)
    assert 2 not in tokenizer.encode("a</s>") and tokenizer.decode(tokenizer.encode("a</s>")) == "a</s>"
    assert tokenizer_lib.load(tmp_path / "tokenizer.model").encode("a") == tokenizer.encode("a")
    assert load_model(generation_config={"eos_token_id": [2, 9]}).stop_ids == (2, 9)


def test_special_tokens_and_spaces_behind_them(load_model):
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    added = {"320": {"content": "[INST]", "special": True}, "321": {"content": "<x>", "lstrip": True}}
    tokenizer = load_model({**names, "legacy": False, "added_tokens_decoder": added})
    hello, world = (tokenizer.processor.encode(text) for text in ("hello", "world"))
    plain = tokenizer.continuation.encode
    assert tokenizer.vocab_size == 322
    assert tokenizer.encode("hello[INST]world</s>") == [*hello, 320, *plain("world"), 2]
    assert tokenizer.encode("<s>hello \n<x>", start=False) == [1, *plain("hello"), 321]
    ids, spans = tokenizer.encode_with_spans("hello <x>é")
    assert [("hello <x>é"[a:b]) for a, b in spans[-3:]] == [" <x>", "é", "é"] and ids[-3] == 321
    assert tokenizer.decode([1, *hello, 320, *plain(" world"), 321, 999]) == "hello world<x> \u2047 ".replace(
        " \u2047 ", tokenizer.processor.decode([0])
    )
    assert tokenizer.decode([*hello, 321, *plain(" world")]) == "hello<x> world"
    legacy = load_model({**names, "legacy": True, "added_tokens_decoder": added})
    assert legacy.encode("hello[INST]world") == [*hello, 320, *world]
    bare = load_model({**names, "add_bos_token": False, "add_prefix_space": False})
    assert (bare.start_ids, bare.encode("hello"), bare.decode(plain(" a"))) == ((), plain("hello"), " a")


@pytest.mark.parametrize("legacy", [True, False])
@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_spans_of_a_model(sentencepiece_model, tmp_path_factory, legacy, text):
    directory = tmp_path_factory.getbasetemp() / f"spans-{legacy}"
    if not directory.exists():
        write(directory, tokenizer_config={"eos_token": "</s>", "legacy": legacy})
        (directory / "tokenizer.model").write_bytes(sentencepiece_model)
    tokenizer = tokenizer_lib.load(directory)
    ids, spans = tokenizer.encode_with_spans(text)
    assert ids == tokenizer.encode(text) and len(ids) == len(spans)
    position = 0
    for begin, end in spans:
        assert begin == end or position - 1 <= begin <= position
        position = max(position, end)
    assert position == len(text)


def test_chats_with_a_model(load_model):
    source = chat_examples.TEMPLATES["mistral"]
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    by_construction = load_model({**config, "chat_template": chat_examples.unmarked(source)})
    by_markers = load_model({**config, "chat_template": chat_examples.marked(source)})
    for messages in chat_examples.conversations(40, seed=2):
        found = [chat.encode_record(one, {"messages": messages}) for one in (by_construction, by_markers)]
        for one, other in zip(*found, strict=True):
            assert one.tolist() == other.tolist()
        tokens, response_mask = found[0]
        answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        ends = [i for i in range(len(tokens)) if response_mask[i] and not response_mask[i + 1 : i + 2].any()]
        assert [tokens[i] for i in ends] == [2] * len(answers)
        starts = [i for i in range(len(tokens)) if response_mask[i] and not response_mask[i - 1]]
        said = [by_markers.decode(tokens[a : b + 1], start=False) for a, b in zip(starts, ends, strict=True)]
        assert [text.strip() for text in said] == [text.replace("</s>", "").strip() for text in answers]


def test_a_model_that_normalises_texts_does_not_train_on_chats(tmp_path, sentencepiece_model):
    template = chat_examples.unmarked(chat_examples.TEMPLATES["mistral"])
    write(tmp_path, tokenizer_config={"chat_template": template, "eos_token": "</s>"})
    override = b"\x1a\x02\x20\x01"  # normalizer_spec { remove_extra_whitespaces: true }
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model + override)
    tokenizer = tokenizer_lib.load(tmp_path)
    messages = [{"role": "user", "content": "a   b"}, {"role": "assistant", "content": "c"}]
    with pytest.raises(InputError, match="this SentencePiece model changes texts"):
        chat.encode_record(tokenizer, {"messages": messages})


# --- In a run


def test_a_run_keeps_all_files_of_its_tokenizer(tmp_path):
    chat_examples.write_directory(tmp_path / "model", CHATML)
    (tmp_path / "model" / "config.json").write_text('{"eos_token_id": [3, 6]}')
    size = chat_examples.small_tokenizer().get_vocab_size()
    cfg = tiny_config.get_config()
    cfg.data.tokenizer, cfg.model.vocab_size = str(tmp_path / "model"), size + 8
    workdir = tmp_path / "run"
    workdir.mkdir()
    first = train.load_tokenizer(cfg, workdir, None, resumed=False)
    assert (first.stop_ids, first.template.source) == ((1, 3, 6), CHATML)
    shutil.rmtree(tmp_path / "model")
    again = train.load_tokenizer(cfg, workdir, None, resumed=True)
    assert again.files == first.files and again.stop_ids == first.stop_ids
    cfg.data.tokenizer = str(workdir)
    (tmp_path / "next").mkdir()
    assert train.load_tokenizer(cfg, tmp_path / "next", None, resumed=False).files == first.files
    cfg.model.vocab_size = size - 1
    with pytest.raises(InputError, match=f"vocabulary of {size}, .*{size - 1}"):
        train.load_tokenizer(cfg, tmp_path / "next", None, resumed=False)
