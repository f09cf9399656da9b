"""Writes chat_references.json: how transformers renders and encodes the chats and templates of chat_examples.py.

    pip install transformers jinja2 tokenizers
    python tests/data/make_chat_references.py

For each template and the first chats: the text, the prompt (the chat without its last message, with the generation
prompt), the token ids of the text, and the response mask from `{% generation %}`.
"""

import json
import tempfile
from pathlib import Path

import chat_examples
import transformers

COUNT = 9  # chats of each template


def references(template: str, directory: Path) -> list[dict]:
    chat_examples.write_directory(directory, chat_examples.marked(template))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    rows = []
    for chat in chat_examples.conversations(COUNT):
        encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        rows.append(
            {
                "text": tokenizer.apply_chat_template(chat, tokenize=False),
                "prompt": prompt,
                "tokens": encoded["input_ids"],
                "response_mask": "".join(map(str, encoded["assistant_masks"])),
            }
        )
    return rows


def main() -> None:
    results = {"transformers": transformers.__version__}
    with tempfile.TemporaryDirectory() as directory:
        for name, template in chat_examples.TEMPLATES.items():
            results[name] = references(template, Path(directory) / name)
    lines = [f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in results.items()]
    target = Path(__file__).with_name("chat_references.json")
    target.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
