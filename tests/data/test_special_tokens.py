"""A tokenizer's metadata from the other files in its directory, and that these files are stored with it."""

import json
import shutil

import chat_examples
import pytest
import tiny_config
from tokenizer_files import CHATML, llama_style, refusal, write
from tokenizers import processors

from msn_jax import train
from msn_jax.cli import InputError
from msn_jax.data import tokenizer as tokenizer_lib


@pytest.mark.parametrize(
    ("config", "start_ids"),
    [
        ({}, (1,)),
        ({"add_bos_token": False}, ()),
        ({"add_bos_token": True, "bos_token": {"content": "<s>", "lstrip": False}}, (1,)),
        ({"add_bos_token": True, "bos_token": None}, ()),
    ],
)
def test_start_ids(tmp_path, config, start_ids):
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
        ({"config": {"eos_token_id": [6, 3]}, "generation_config": {"temperature": 0.6}}, (6, 3)),
        ({"config": {"eos_token_id": [6, 3]}, "generation_config": {"eos_token_id": None, "bos_token_id": 0}}, (6, 3)),
        ({"config": {"eos_token_id": 6}, "generation_config": {"eos_token_id": []}}, (6,)),
        (
            {
                "config": {"eos_token_id": [1, 6]},
                "generation_config": {"top_p": 0.9},
                "tokenizer_config": {"eos_token": "</s>"},
            },
            (1, 6),
        ),
        (
            {"special_tokens_map": {"eos_token": {"content": "<|eot_id|>"}}, "tokenizer_config": {"eos_token": None}},
            (6,),
        ),
    ],
)
def test_stop_ids(tmp_path, files, stop_ids):
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


def test_a_named_token_of_the_vocabulary_is_special(tmp_path):
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
        loaded = tokenizer_lib.load(tmp_path).template
        assert (loaded and loaded.source) == source
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}é", encoding="utf-8")
    assert tokenizer_lib.load(tmp_path).template.render([], False) == "</s>é"
    chat_examples.write_directory(tmp_path, "other")
    assert tokenizer_lib.load(tmp_path).template.render([], False) == "</s>é"


def test_files_are_stored_unchanged(tmp_path):
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
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "/tokenizer.json: not a tokenizer of the library tokenizers, or damaged"),
        ("tokenizer.json", "", "/tokenizer.json: not a tokenizer of the library tokenizers, or damaged"),
        ("tokenizer_config.json", "{", "/tokenizer_config.json: line 1: broken JSON (Exp"),
        ("tokenizer_config.json", "[]", "/tokenizer_config.json: must be a JSON object, not list"),
        ("tokenizer_config.json", "{}", "/tokenizer.json: no end of sequence"),
        ("tokenizer_config.json", '{"eos_token": 7}', "/tokenizer_config.json: eos_token: is 7"),
        ("tokenizer_config.json", '{"chat_template": 7}', "/tokenizer_config.json: chat_template: is of type int"),
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
            "/tokenizer_config.json: additional_special_tokens: must be a list",
        ),
        (
            "generation_config.json",
            '{"eos_token_id": 4294967296}',
            "/generation_config.json: eos_token_id: is 42949672",
        ),
        ("added_tokens.json", '{"<q>": 1e400}', ": malformed added tokens"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "a", "template": ""}, {"name": "b", "template": ""}]}',
            "/tokenizer_config.json: chat_template: none of a, b is named 'default'",
        ),
        ("generation_config.json", '{"eos_token_id": "x"}', "/generation_config.json: eos_token_id: is 'x'"),
        ("generation_config.json", '{"eos_token_id": [true]}', "/generation_config.json: eos_token_id: is [True]"),
        ("config.json", '{"eos_token_id": -1}', "/config.json: eos_token_id: is -1; must be a token id"),
        ("config.json", '{"eos_token_id": [2, 4294967296]}', "/config.json: eos_token_id: is [2, 4294967296]"),
        ("config.json", "no", "/config.json: line 1: broken JSON (Exp"),
    ],
)
def test_malformed_files_are_named(tmp_path, name, content, message):
    chat_examples.write_directory(tmp_path, CHATML)
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert refusal(tmp_path).startswith(message)


def test_a_directory_without_tokenizer(tmp_path):
    assert refusal(tmp_path) == ": no tokenizer: neither tokenizer.json nor tokenizer.model"
    assert refusal(tmp_path / "none") == ": cannot read the tokenizer: No such file or directory"
    write(tmp_path, llama_style().to_str())
    assert "name its directory" in refusal(tmp_path / "tokenizer.json")


def test_a_run_stores_all_files_of_its_tokenizer(tmp_path):
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
