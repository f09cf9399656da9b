"""Records to tokens, and which of them are the response.

    prompt/response   <s> prompt response </s>                                            response and </s>
    messages          <s> <|user|> question <|end|> <|assistant|> answer <|end|> ...      answers and their <|end|>
    text              <s> text </s>                                                       all but the first

The right column is the response mask: what the model learns to say. A prompt and its response are encoded apart, so
that training sees the same tokens as generation, which only has the prompt.

So it is for a tokenizer of our own. Those of others put in front of raw text what their makers put there, `<s>` or
nothing, and write messages with their chat template: the tokens are those of `apply_chat_template` of transformers,
where a special token that somebody typed into a message is that token. A template writes `<s>` itself if it wants it.
"""

import numpy as np

from msn_jax.cli import InputError
from msn_jax.data.tokenizer import ROLES, Tokenizer


def encode_record(tokenizer: Tokenizer, record: dict) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [n] and response mask bool [n] of a record as `corpora.load` gives it.

    Raises:
      InputError: an unknown role; messages for a tokenizer without roles or chat template; or a template that refuses
        them, or does not tell exactly which tokens are the assistant's.
    """
    if "messages" in record and tokenizer.template is not None:
        return _encode_chat(tokenizer, record["messages"])
    if "messages" in record:
        parts = _turns(tokenizer, record["messages"])
    elif "text" in record:
        parts = [([*tokenizer.encode(record["text"]), tokenizer.eos_id], True)]
    else:
        prompt, response = record["prompt"], record["response"]
        answer = tokenizer.encode(response, start=not prompt)
        parts = [(tokenizer.encode(prompt), False), ([*answer, tokenizer.eos_id], True)]
    parts = [(tokenizer.start_ids, False), *parts]
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids, _ in parts])
    response_mask = np.concatenate([np.full(len(ids), is_response) for ids, is_response in parts])
    response_mask[0] = False  # nothing before it predicts it
    return tokens, response_mask


def encode_prompt(tokenizer: Tokenizer, prompt: str | list[dict]) -> list[int]:
    """Token ids to generate from: raw text, or messages up to the point where the assistant speaks.

    Raises:
      InputError: an empty prompt, an unknown role, messages for a tokenizer without roles or chat template, or a
        template that refuses them.
    """
    if not prompt:
        raise InputError("empty prompt: give some text, or at least one message")
    if isinstance(prompt, str):
        ids = [*tokenizer.start_ids, *tokenizer.encode(prompt)]
    elif tokenizer.template is not None:
        _check_messages(prompt)
        ids = tokenizer.encode(tokenizer.template.render(prompt, add_generation_prompt=True))
    else:
        turns = _turns(tokenizer, prompt)
        ids = [*tokenizer.start_ids, *(i for ids, _ in turns for i in ids), tokenizer.role_ids["assistant"]]
    if not ids:
        raise InputError("empty prompt: the tokenizer leaves nothing of it")
    return ids


def _encode_chat(tokenizer: Tokenizer, messages: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and response mask of messages, by the chat template. A token that is partly the assistant's is all his."""
    _check_messages(messages)
    text, spans = tokenizer.template.render_with_spans(messages, tokenizer.special_tokens)
    ids, places = tokenizer.encode_with_spans(text)
    begins, ends = np.array(places, np.int64).reshape(-1, 2).T
    response_mask = np.zeros(len(ids), bool)
    for first, last in spans:
        (covered,) = np.nonzero((begins < last) & (ends > first))
        if covered.size:
            response_mask[covered[0] : covered[-1] + 1] = True
    return np.asarray(ids, np.int32), response_mask


def _turns(tokenizer: Tokenizer, messages: list[dict]) -> list[tuple[list[int], bool]]:
    """(ids, is response) of the parts of a conversation."""
    if tokenizer.role_ids is None:
        raise InputError(
            "this tokenizer has no role symbols and no chat template: give raw prompts, a tokenizer trained by this "
            "project, or one with a chat template"
        )
    _check_messages(messages)
    parts = []
    for message in messages:
        role, content = message["role"], message["content"]
        parts.append(([tokenizer.role_ids[role]], False))
        parts.append(([*tokenizer.encode(content), tokenizer.end_id], role == "assistant"))
    return parts


def _check_messages(messages: list[dict]) -> None:
    """InputError if a message has an unknown role, or no text."""
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(f"unknown role {role!r}: known roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise InputError(f"the content of a message with role {role!r} is not text")
