"""Records to tokens, and which of them are the response, for a tokenizer of our own.

    prompt/response   <s> prompt response </s>                                            response and </s>
    messages          <s> <|user|> question <|end|> <|assistant|> answer <|end|> ...      answers and their <|end|>
    text              <s> text </s>                                                       all but <s>

The right column is the response mask: what the model learns to say. A prompt and its response are encoded apart, so
that training sees the same tokens as generation, which only has the prompt.
"""

import numpy as np

from msn_jax.cli import InputError
from msn_jax.data.tokenizer import ROLES, Tokenizer


def encode_record(tokenizer: Tokenizer, record: dict) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [n] and response mask bool [n] of a record as `corpora.load` gives it.

    Raises:
      InputError: an unknown role, or messages for a tokenizer without roles.
    """
    if "messages" in record:
        parts = _turns(tokenizer, record["messages"])
    elif "text" in record:
        parts = [([*tokenizer.encode(record["text"]), tokenizer.eos_id], True)]
    else:
        prompt, response = record["prompt"], record["response"]
        answer = tokenizer.encode(response, start=not prompt)
        parts = [(tokenizer.encode(prompt), False), ([*answer, tokenizer.eos_id], True)]
    parts = [([tokenizer.bos_id], False), *parts]
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids, _ in parts])
    response_mask = np.concatenate([np.full(len(ids), is_response) for ids, is_response in parts])
    return tokens, response_mask


def encode_prompt(tokenizer: Tokenizer, prompt: str | list[dict]) -> list[int]:
    """Token ids to generate from: raw text, or messages up to the point where the assistant speaks.

    Raises:
      InputError: an empty prompt, an unknown role, or messages for a tokenizer without roles.
    """
    if not prompt:
        raise InputError("empty prompt: give some text, or at least one message")
    if isinstance(prompt, str):
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    turns = _turns(tokenizer, prompt)
    return [tokenizer.bos_id, *(i for ids, _ in turns for i in ids), tokenizer.role_ids["assistant"]]


def _turns(tokenizer: Tokenizer, messages: list[dict]) -> list[tuple[list[int], bool]]:
    """(ids, is response) of the parts of a conversation."""
    if tokenizer.role_ids is None:
        raise InputError("this tokenizer has no role symbols: give raw prompts, or a tokenizer trained by this project")
    parts = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(f"unknown role {role!r}: known roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise InputError(f"the content of a message with role {role!r} is not text")
        parts.append(([tokenizer.role_ids[role]], False))
        parts.append(([*tokenizer.encode(content), tokenizer.end_id], role == "assistant"))
    return parts
