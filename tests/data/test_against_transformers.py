"""Live comparison with transformers, over the tokenizers and chats of ../shared/data where both are there.

pip install transformers
python -m pytest -m slow tests/data/test_against_transformers.py -s
"""

import gzip
import json
from pathlib import Path

import chat_examples
import pytest

from msn_jax.data import chat
from msn_jax.data import tokenizer as tokenizer_lib

SHARED = Path(__file__).parents[3] / "shared" / "data"
TOKENIZERS = SHARED / "tokenizers"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="no ../shared/data/tokenizers"),
]

# (template's own text, the same with `{% generation %}`): where the assistant speaks, written by hand.
MARKS = {
    "deepseek_r1": [
        (
            "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}",
            "{{'<｜Assistant｜>'}}{% generation %}{{content + '<｜end▁of▁sentence｜>'}}{% endgeneration %}",
        )
    ],
    "minimind": [
        (
            "{{ content + '</s>' + '\\n' }}",
            "{% generation %}{{ content + '</s>' }}{% endgeneration %}{{ '\\n' }}",
        )
    ],
    "qwen3": [
        (
            "        {%- if loop.index0 > ns.last_query_index %}\n",
            "        {{- '<|im_start|>assistant\\n' }}{%- generation %}\n"
            "        {%- if loop.index0 > ns.last_query_index %}\n",
        ),
        ("{{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning", "{{- '<think>\\n' + reasoning"),
        (
            "{{- '<|im_start|>' + message.role + '\\n' + content }}\n            {%- endif",
            "{{- content }}\n            {%- endif",
        ),
        (
            "{{- '<|im_start|>' + message.role + '\\n' + content }}\n        {%- endif",
            "{{- content }}\n        {%- endif",
        ),
        (
            "        {{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}",
            "        {{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}\n    {%- elif message.role == \"tool\" %}",
        ),
    ],
}


def shared_chats() -> list[list[dict]]:
    """Chats of the file formats, the longest cut to six messages."""
    rows = json.loads((SHARED / "chat_formats" / "dummy_conversation.json").read_text(encoding="utf-8"))
    roles = {"human": "user", "gpt": "assistant"}
    turns = [[{"role": roles[t["from"]], "content": t["value"]} for t in row["conversations"]][:6] for row in rows]
    alpaca = json.loads((SHARED / "chat_formats" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    turns += [
        [
            {"role": "user", "content": f"{row['instruction']}\n{row['input']}"},
            {"role": "assistant", "content": row["output"]},
        ]
        for row in alpaca
    ]
    return [chat for chat in turns if chat[0]["role"] == "user" and len(chat) % 2 == 0]


CHATS = [*chat_examples.conversations(200, seed=1), *(shared_chats()[::10] if TOKENIZERS.is_dir() else [])]


def write_shared(name: str, directory: Path, mark: bool) -> None:
    """A Hugging Face directory of a shared tokenizer. Qwen3's comes without vocabulary and gets that of minimind."""
    config = json.loads((TOKENIZERS / f"{name}_tokenizer_config.json").read_text(encoding="utf-8"))
    vocabulary = TOKENIZERS / ("minimind_tokenizer.json" if name == "qwen3" else f"{name}_tokenizer.json")
    content = vocabulary.read_bytes() if vocabulary.exists() else gzip.decompress(Path(f"{vocabulary}.gz").read_bytes())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for own, marked in MARKS[name] if mark else ():
        assert config["chat_template"].count(own) == 1, own
        config["chat_template"] = config["chat_template"].replace(own, marked)
    directory.mkdir()
    (directory / "tokenizer.json").write_bytes(content)
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_mistral(directory: Path, mark: bool) -> None:
    style = chat_examples.TEMPLATES["mistral"]
    template = chat_examples.marked(style) if mark else chat_examples.unmarked(style)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes((TOKENIZERS / "mistral_v1.model").read_bytes())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))


def compare(theirs, ours, marked_ours, marked_theirs, check_tokens: bool) -> int:
    """Texts, prompts, tokens and masks of all chats; how many were compared."""
    for messages in CHATS:
        text = theirs.apply_chat_template(messages, tokenize=False)
        assert ours.template.render(messages, add_generation_prompt=False) == text
        prompt = theirs.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert ours.template.render(messages[:-1], add_generation_prompt=True) == prompt
        tokens, response_mask = chat.encode_record(ours, {"messages": messages})
        _, by_markers = chat.encode_record(marked_ours, {"messages": messages})
        assert response_mask.tolist() == by_markers.tolist()
        if check_tokens:
            expected = marked_theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            assert tokens.tolist() == expected["input_ids"]
            assert response_mask.astype(int).tolist() == expected["assistant_masks"]
            ids = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
            assert chat.encode_prompt(ours, messages[:-1]) == ids
        assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True) or not check_tokens
    return len(CHATS)


@pytest.mark.parametrize("name", [*MARKS, "mistral_v1", *chat_examples.TEMPLATES])
def test_chats(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    for mark in (False, True):
        directory = tmp_path / str(mark)
        if name in MARKS:
            write_shared(name, directory, mark)
        elif name == "mistral_v1":
            write_mistral(directory, mark)
        else:
            template = chat_examples.TEMPLATES[name]
            chat_examples.write_directory(
                directory, chat_examples.marked(template) if mark else chat_examples.unmarked(template)
            )
    plain, marked = tmp_path / "False", tmp_path / "True"
    theirs, marked_theirs = (transformers.AutoTokenizer.from_pretrained(path) for path in (plain, marked))
    ours, marked_ours = (tokenizer_lib.load(path) for path in (plain, marked))
    # transformers builds its own BPE from a SentencePiece model, which cuts runs of spaces otherwise than that does.
    count = compare(theirs, ours, marked_ours, marked_theirs, check_tokens=name != "mistral_v1")
    print(f"{name}: {count} chats, no difference")


def test_a_bare_sentencepiece_model():
    import sentencepiece

    directory = SHARED / "stories260k"
    tokenizer = tokenizer_lib.load(directory)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    assert (tokenizer.vocab_size, tokenizer.start_ids, tokenizer.stop_ids) == (512, (1,), (2,))
    for messages in CHATS:
        text = messages[-1]["content"].replace("\u2581", "")
        assert tokenizer.encode(text) == reference.encode(text)
        assert chat.encode_prompt(tokenizer, text or "a")[0] == 1
        assert tokenizer.decode(tokenizer.encode(text)) == text
