"""Templates, a small tokenizer and conversations that several tests and `make_chat_references.py` share.

The templates are in the styles of well-known models. GENERATION and END mark where the assistant's part begins and
ends: `unmarked` removes them, `marked` replaces them by `{% generation %}`, and both must render the same text.
"""

import json
import random

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}GENERATION{{ message['content'] + '<|im_end|>' }}END{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TEMPLATES = {
    "chatml": CHATML,
    "chatml_default_system": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
        + CHATML
    ),
    "llama3": """{{ bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' -%}
        GENERATION{{ message['content'] | trim + '<|eot_id|>' }}END
    {%- else -%}
        {{ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
    # The system prompt goes into the first question; no generation prompt; turns must alternate.
    "mistral": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{{ bos_token }}{% for turn in turns %}{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if turn['role'] == 'user' %}"
        "{{ '[INST] ' + (system if loop.first else '') + turn['content'] + ' [/INST]' }}"
        "{% else %}GENERATION{{ ' ' + turn['content'].strip() + eos_token }}END{% endif %}{% endfor %}"
    ),
    # A space before the end token, and a generation prompt that is always rendered.
    "llama2": (
        "{% for message in messages %}{% if message.role == 'assistant' %}"
        "GENERATION{{ ' ' ~ message.content | trim ~ ' ' ~ eos_token }}END{% elif message.role == 'user' %}"
        "{{ bos_token ~ '[INST] ' ~ message.content | trim ~ ' [/INST]' }}{% else %}"
        "{{ '<<SYS>>' ~ message.content ~ '<</SYS>>' }}{% endif %}{% endfor %}"
    ),
    # Thoughts are dropped from all turns except the last, which always has one.
    "thinking": """{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
    {%- set parts = message.content.split('</think>') %}
    {%- set body = parts[-1].lstrip('\\n') %}
    {%- if loop.index0 > ns.last %}
        {%- set thought = parts[0].replace('<think>', '').strip() if parts | length > 1 else '' %}
        {%- set body = '<think>\\n' + thought + '\\n</think>\\n\\n' + body %}
    {%- endif %}
    {#- -#}GENERATION{{- body + '<|im_end|>' }}END{{- '\\n' }}
{%- else %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    # The generation prompt opens a thought that finished turns do not show.
    "open_thought": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}GENERATION{{ message['content'].split('</think>')[-1] }}"
        "{{ '<|im_end|>' }}END{{ '\\n' }}{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    ),
    # Another name for the assistant, two special tokens after the last turn, today's year, JSON.
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<|im_start|>' + role + '\\n' }}{% if role == 'model' %}GENERATION{{ m.content | trim + '<|im_end|>' }}END"
        "{% if loop.last %}{{ eos_token }}{% endif %}{% elif role == 'system' %}"
        "{{ {'note': m.content, 'year': strftime_now('%Y') | length} | tojson + '<|im_end|>' }}"
        "{% else %}{{ m.content | trim + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"
    ),
}

SPECIAL_TOKENS = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]"),
]
_WORDS = ["user", "assistant", "system", "think", "hello", "world", "Ġhello", "Ġworld", "Ġis", "ĊĊ", "ĠĠ"]
_PIECES = [
    *(
        "Hello",
        " hello",
        "world",
        "  ",
        "\n",
        "\t",
        "é",
        "日本",
        "😀",
        "\u00a0",
        "\u2581",
        "a",
        "1234",
        "{{ x }}",
        '"',
        "&",
    ),
    *("<", "<think>", "</s", "assistant\n", "user", "\ue000", "[INST", "\\n", "'", "e\u0301", "\u200d"),
]


def unmarked(template: str) -> str:
    return template.replace("GENERATION", "").replace("END", "")


def marked(template: str) -> str:
    return template.replace("GENERATION", "{% generation %}").replace("END", "{% endgeneration %}")


def small_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE that needs no training, so that its ids are the same everywhere."""
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = []
    for word in _WORDS:
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if pair not in merges:
                merges.append(pair)
                vocab.setdefault("".join(pair), len(vocab))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def write_directory(directory, template: str | list | None, **config) -> None:
    """Writes the tokenizer files of a Hugging Face directory with the small tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    small_tokenizer().save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def conversations(count: int, seed: int = 0) -> list[list[dict]]:
    """Chats with and without system prompt, of up to four rounds; contents may be empty, blank, odd or long."""
    rng = random.Random(seed)

    def content() -> str:
        kind = rng.random()
        if kind < 0.1:
            return ""
        text = "".join(rng.choice(_PIECES) for _ in range(rng.randint(1, 12)))
        return f" {text}\n" if kind < 0.2 else text

    chats = []
    for index in range(count):
        chat = [{"role": "system", "content": content()}] if index % 3 == 0 else []
        for _ in range(rng.randint(1, 4)):
            chat.append({"role": "user", "content": content()})
            thought = f"<think>\n{content()}\n</think>\n\n" if rng.random() < 0.2 else ""
            chat.append({"role": "assistant", "content": thought + content()})
        chats.append(chat)
    return chats
