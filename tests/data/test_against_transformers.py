"""Live comparison with transformers, over the tokenizers and chats in ../shared/data, if both are available.

pip install transformers
python -m pytest -m slow tests/data/test_against_transformers.py -s
"""

import gzip
import json
import random
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

# (template's own source, the same with `{% generation %}`): the assistant's part, marked by hand.
MARKS = {
    "deepseek_r1": [
        (
            "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}",
            "{{'<｜Assistant｜>'}}{% generation %}{{content + '<｜end▁of▁sentence｜>'}}{% endgeneration %}",
        ),
        (
            "{{'<｜tool▁outputs▁end｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}",
            "{{'<｜tool▁outputs▁end｜>'}}{% generation %}"
            "{{message['content'] + '<｜end▁of▁sentence｜>'}}{% endgeneration %}",
        ),
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
    """Chats in the file formats, truncated to six messages."""
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


def with_special_tokens(chats: list[list[dict]], tokens: list[str]) -> list[list[dict]]:
    """The chats with special tokens spelled in their contents."""
    rng = random.Random(2)
    return [
        [{**m, "content": f"{m['content']}{rng.choice(tokens)}\nx{rng.choice(tokens)}"} for m in chat] for chat in chats
    ]


def tool_chats(as_text: bool) -> list[list[dict]]:
    """Chats with calls and results; the arguments are objects, or their JSON text."""

    def call(*arguments: dict, content: str | None = "", **fields: str) -> dict:
        calls = [
            {
                "id": str(i),
                "type": "function",
                "function": {"name": f"f{i}", "arguments": json.dumps(a) if as_text else a},
            }
            for i, a in enumerate(arguments)
        ]
        return {"role": "assistant", "content": content, "tool_calls": calls, **fields}

    user, answer = {"role": "user", "content": "q é"}, {"role": "assistant", "content": "It is 7."}
    result = {"role": "tool", "content": '{"a": 7}', "tool_call_id": "0"}
    return [
        [user, call({"x": 1}), result, answer],
        [user, call({}, {"y": "é"}, content=None), result, result, answer],
        [
            {"role": "system", "content": "Be brief."},
            user,
            call({"z": [1, None]}, content="Let me see."),
            result,
            answer,
        ],
        [user, call({"x": 1}), result, answer, user, answer],
        [user, answer, user, call({"x": 1})],
    ]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f0",
            "description": "d",
            "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
        },
    }
]
CHATS = [*chat_examples.conversations(200, seed=1), *(shared_chats()[::10] if TOKENIZERS.is_dir() else [])]


def write_shared(name: str, directory: Path, mark: bool) -> None:
    """A Hugging Face directory of a shared tokenizer. Qwen3's has no vocabulary file and gets minimind's."""
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


def compare(theirs, ours, marked_ours, marked_theirs, check_tokens: bool, chats: list, tools=None, **options) -> int:
    """Compares texts, prompts, tokens and masks of all chats; returns their number."""
    for messages in chats:
        text = theirs.apply_chat_template(messages, tools, tokenize=False)
        assert ours.template.render(messages, False, tools) == text
        prompt = theirs.apply_chat_template(messages[:-1], tools, tokenize=False, add_generation_prompt=True)
        assert ours.template.render(messages[:-1], True, tools) == prompt
        record = {"messages": messages, "tools": tools}
        tokens, response_mask = chat.encode_record(ours, record, **options)
        _, by_markers = chat.encode_record(marked_ours, record, **options)
        assert response_mask.tolist() == by_markers.tolist()
        if check_tokens:
            expected = marked_theirs.apply_chat_template(
                messages, tools, return_dict=True, return_assistant_tokens_mask=True
            )
            assert tokens.tolist() == expected["input_ids"]
            assert response_mask.astype(int).tolist() == expected["assistant_masks"]
            ids = theirs.apply_chat_template(messages[:-1], tools, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            assert chat.encode_prompt(ours, messages[:-1], tools, **options) == ids
        assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True) or not check_tokens
    return len(chats)


def load_all(name: str, tmp_path: Path) -> tuple:
    """The tokenizers (transformers', ours, ours with markers, transformers' with markers)."""
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
    return theirs, ours, marked_ours, marked_theirs


@pytest.mark.parametrize("name", [*MARKS, "mistral_v1", *chat_examples.TEMPLATES])
def test_chats(name, tmp_path):
    # transformers converts a SentencePiece model to its own BPE, which splits runs of spaces differently.
    count = compare(*load_all(name, tmp_path), check_tokens=name != "mistral_v1", chats=CHATS)
    print(f"{name}: {count} chats, no difference")


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_calls_and_results(as_text, tools, tmp_path):
    count = compare(*load_all("qwen3", tmp_path), check_tokens=True, chats=tool_chats(as_text), tools=tools)
    print(f"qwen3: {count} chats with calls, no difference")


def test_calls_without_markers(tmp_path):
    """DeepSeek's template spreads a turn with calls over several branches, where no block could mark it."""
    theirs, ours, *_ = load_all("deepseek_r1", tmp_path)
    for messages in tool_chats(as_text=True):
        tokens, response_mask = chat.encode_record(ours, {"messages": messages})
        messages = [{"content": "", **{k: v for k, v in m.items() if v is not None}} for m in messages]
        assert tokens.tolist() == theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
        learned = "".join(ours.backend.decode([i], skip_special_tokens=False) for i in tokens[response_mask])
        turns = [m for m in messages if m["role"] == "assistant"]
        assert learned.count("<｜end▁of▁sentence｜>") == len(turns) and "<｜User｜>" not in learned
        assert learned.count("<｜tool▁call▁begin｜>") == sum(len(m.get("tool_calls", [])) for m in turns)
        assert "<｜tool▁output" not in learned and learned.count("It is 7.") == len(turns) - sum(
            "tool_calls" in m for m in turns
        )


@pytest.mark.parametrize("name", ["deepseek_r1", "minimind", "qwen3", "chatml", "llama3"])
def test_parsing_special_tokens_in_contents(name, tmp_path):
    theirs, ours, *_ = load_all(name, tmp_path)
    for messages in with_special_tokens(CHATS, sorted(ours.added_tokens - {"</think>"})):
        ids = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert chat.encode_prompt(ours, messages[:-1], parse_special_tokens=True) == ids
        harmless = [{**message, "content": "a"} for message in messages[:-1]]
        control = {ours.backend.token_to_id(token) for token in ours.control_tokens}
        own, expected = (
            [i for i in chat.encode_prompt(ours, one) if i in control] for one in (messages[:-1], harmless)
        )
        assert own == expected


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
