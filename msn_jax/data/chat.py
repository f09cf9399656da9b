"""Encodes records and prompts, with the mask of the tokens that the model learns.

    prompt/response   <s> prompt response </s>                                            response and </s>
    messages          <s> <|user|> content <|end|> <|assistant|> reply <|end|> ...        replies and their <|end|>
    text              <s> text </s>                                                       all but the first

The right column is the response mask: the tokens that the model learns to predict. A prompt and its response are
encoded separately, so that training sees the same tokens as generation, which has only the prompt.

The table shows a tokenizer of this project. Hugging Face tokenizers put the start tokens of their own configuration in
front of raw text, and render messages with their chat template, which writes `<s>` itself if it wants it: the tokens
are those of transformers' `apply_chat_template`. The exception is a special token that a message spells. It is encoded
as text (`control_tokens.py`), unless `parse_special_tokens` selects the behavior of transformers.
"""

import datetime

import numpy as np

from msn_jax.cli import InputError, warn_once
from msn_jax.data import control_tokens, response_spans
from msn_jax.data import messages as chat_messages
from msn_jax.data.chat_template import Span
from msn_jax.data.tokenizer import Tokenizer

_FIELDS = ("text", "prompt", "response", "messages", "tools")  # of a record; others are not read


def encode_record(
    tokenizer: Tokenizer, record: dict, parse_special_tokens: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and response mask of a training record.

    Args:
      tokenizer: the model's.
      record: {'text'}, {'prompt', 'response'}, or {'messages', 'tools' (optional)} with messages as in `messages.py`.
        A message with `"train": False` is context: not in the response mask.
      parse_special_tokens: whether special tokens that a message spells become those tokens, as in transformers.

    Returns:
      Tokens int32 [n] and response mask bool [n].

    Raises:
      InputError: malformed messages; fields that the tokenizer cannot show; a template that refuses the messages or
        whose assistant turns cannot be located exactly; or a lone surrogate.
    """
    _check_surrogates([record.get(field) for field in _FIELDS])
    if "messages" in record and tokenizer.template is not None:
        return _encode_chat(tokenizer, record["messages"], record.get("tools"), parse_special_tokens)
    if "messages" in record:
        parts = _turns(tokenizer, record["messages"], record.get("tools"), parse_special_tokens)
    elif "text" in record:
        text = tokenizer.encode(record["text"])
        _warn_if_doubled(tokenizer, text, text)
        parts = [([*text, tokenizer.eos_id], True)]
    else:
        prompt = tokenizer.encode(record["prompt"])
        response = tokenizer.encode(record["response"], start=not record["prompt"])
        _warn_if_doubled(tokenizer, prompt or response, response)
        parts = [(prompt, False), ([*response, tokenizer.eos_id], True)]
    parts = [(tokenizer.start_ids, False), *parts]
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids, _ in parts])
    response_mask = np.concatenate([np.full(len(ids), is_response) for ids, is_response in parts])
    response_mask[0] = False  # no token before it predicts it
    return tokens, response_mask


def encode_prompt(
    tokenizer: Tokenizer, prompt: str | list[dict], tools: list[dict] | None = None, parse_special_tokens: bool = False
) -> list[int]:
    """Token ids to generate from: raw text, or messages followed by the header of the assistant's turn.

    Args:
      tokenizer: the model's.
      prompt: raw text, in which special tokens are always parsed, or messages as in `messages.py`.
      tools: JSON schemas of the functions that the model may call; only with messages.
      parse_special_tokens: whether special tokens that a message spells become those tokens, as in transformers.

    Raises:
      InputError: an empty prompt, malformed messages, fields that the tokenizer cannot show, a template that refuses
        the messages, or a lone surrogate.
    """
    if not prompt:
        raise InputError("empty prompt: give some text, or at least one message")
    _check_surrogates([prompt, tools])
    if isinstance(prompt, str):
        if tools:
            raise InputError("tools need messages: a raw text prompt cannot show them")
        ids = tokenizer.encode(prompt)
        _warn_if_doubled(tokenizer, ids, [])
        ids = [*tokenizer.start_ids, *ids]
    elif tokenizer.template is not None:
        messages, _ = chat_messages.normalize(prompt, tools, tokenizer.template)
        text, literal = _render(tokenizer, messages, tools, True, datetime.datetime.now(), parse_special_tokens)
        ids = tokenizer.encode(text, literal=literal)
    else:
        turns = _turns(tokenizer, prompt, tools, parse_special_tokens)
        ids = [*tokenizer.start_ids, *(i for ids, _ in turns for i in ids), tokenizer.role_ids["assistant"]]
    if not ids:
        raise InputError("empty prompt: the tokenizer turns it into no tokens")
    return ids


def _render(
    tokenizer: Tokenizer,
    messages: list[dict],
    tools: list[dict] | None,
    add_generation_prompt: bool,
    now: datetime.datetime,
    parse_special_tokens: bool,
) -> tuple[str, list[Span]]:
    """The rendered conversation, and which characters of it are text although they spell special tokens."""
    text = tokenizer.template.render(messages, add_generation_prompt, tools, now)
    if parse_special_tokens:
        return text, []
    return text, control_tokens.literal_spans(tokenizer, messages, tools, add_generation_prompt, now, text)


def _encode_chat(
    tokenizer: Tokenizer, messages: list[dict], tools: list[dict] | None, parse_special_tokens: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and response mask of messages, by the chat template. A token that overlaps a response belongs to it."""
    messages, learned = chat_messages.normalize(messages, tools, tokenizer.template)
    now = datetime.datetime.now()
    text, literal = _render(tokenizer, messages, tools, False, now, parse_special_tokens)
    turns = [
        is_learned for message, is_learned in zip(messages, learned, strict=True) if message["role"] == "assistant"
    ]
    spans = response_spans.find_response_spans(
        tokenizer.template, messages, tools, now, text, literal, tokenizer.special_tokens, per_message=not all(turns)
    )
    if not all(turns):
        spans = [span for span, is_learned in zip(spans, turns, strict=True) if is_learned]
    ids, covered = tokenizer.encode_with_spans(text, literal)
    begins, ends = np.array(covered, np.int64).reshape(-1, 2).T
    response_mask = np.zeros(len(ids), bool)
    for first, last in spans:
        (inside,) = np.nonzero((begins < last) & (ends > first))
        if inside.size:
            response_mask[inside[0] : inside[-1] + 1] = True
    response_mask[:1] = False  # no token before it predicts it
    return np.asarray(ids, np.int32), response_mask


def _turns(
    tokenizer: Tokenizer, messages: list[dict], tools: list[dict] | None, parse_special_tokens: bool
) -> list[tuple[list[int], bool]]:
    """(ids, is response) of the parts of a conversation, with role symbols."""
    if tokenizer.role_ids is None:
        raise InputError(
            "this tokenizer has no role symbols and no chat template: give raw prompts, a tokenizer trained by this "
            "project, or one with a chat template"
        )
    messages, learned = chat_messages.normalize(messages, tools, None)
    parts = []
    for message, is_learned in zip(messages, learned, strict=True):
        role, content = message["role"], message["content"]
        literal = [] if parse_special_tokens else control_tokens.literal_spans_of(tokenizer, content)
        parts.append(([tokenizer.role_ids[role]], False))
        ids = tokenizer.encode(content, literal=literal)
        parts.append(([*ids, tokenizer.end_id], role == "assistant" and is_learned))
    return parts


def _check_surrogates(value: object) -> None:
    """InputError if a string has half of a surrogate pair, which UTF-8 cannot represent."""
    for text in chat_messages.strings(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text has a lone surrogate, {text[error.start]!a}, which is no character; replace it"
            ) from error


def _warn_if_doubled(tokenizer: Tokenizer, first: list[int], last: list[int]) -> None:
    """Warns if raw text already begins with the start token, or ends with the end token, that is added to it."""
    if tokenizer.start_ids and first[:1] == list(tokenizer.start_ids[:1]):
        warn_once("a raw text begins with the start token, which is added to it as well; remove it from the text")
    if last[-1:] == [tokenizer.eos_id]:
        warn_once("a raw text ends with the end token, which is added to it as well; remove it from the text")
