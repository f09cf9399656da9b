"""Incremental detokenization: no incomplete characters, and nothing that may become part of a stop string."""

from collections.abc import Sequence

from msn_jax.data.tokenizer import Tokenizer

_CONTEXT = 8  # tokens decoded again before new ones: a token's text may depend on the tokens before it
_INCOMPLETE = "\ufffd"  # the decoded text of the first bytes of a character


class TextStream:
    """The growing text of one output.

    `push` returns the text that is final. The texts of all calls and of `finish` join to the output's text, however the
    tokens were split over the calls.
    """

    def __init__(self, tokenizer: Tokenizer, start: bool, stop: Sequence[str] = ()):
        """`start` is False where the output continues a raw prompt; `stop` are the strings that end it."""
        self.tokens: list[int] = []  # tokens of the output
        self.stopped = False  # a stop string was found; the text ends before it
        self._tokenizer, self._start, self._stop = tokenizer, start, tuple(stop)
        self._text = ""  # of the tokens up to the last of `_ends`: complete characters
        self._ends = [0]  # token counts at which a character was complete
        self._num_returned = 0  # characters of the text

    def push(self, tokens: Sequence[int]) -> str:
        """Appends tokens and returns the text that became final. Tokens after a stop string are dropped."""
        # Token by token where the split could matter: the token that completes a stop string must be the last one, and
        # an invalid byte changes how some decoders spell the bytes around it.
        one_by_one = self._stop or _INCOMPLETE in self._tokenizer.decode(tokens, start=False)
        for token in tokens:
            if self.stopped:
                break
            self.tokens.append(token)
            if one_by_one:
                self._extend_text()
        self._extend_text()
        end = len(self._text) - (0 if self.stopped else self._num_withheld())
        return self._return_up_to(end)

    def finish(self) -> str:
        """The rest of the text, with U+FFFD for an incomplete character."""
        self._extend_text(final=True)
        return self._return_up_to(len(self._text))

    def _extend_text(self, final: bool = False) -> None:
        """Appends the text of new tokens if it ends with a complete character, or if it is `final`."""
        new = "" if self.stopped else self._new_text()
        if not new or (new.endswith(_INCOMPLETE) and not final):
            return
        longest = max(map(len, self._stop), default=0)
        search_from = max(len(self._text) - longest, 0)  # a stop string may begin in the earlier text
        self._text += new
        self._ends.append(len(self.tokens))
        matches = [at for at in (self._text.find(stop, search_from) for stop in self._stop) if at >= 0]
        if matches:
            self._text, self.stopped = self._text[: min(matches)], True

    def _new_text(self) -> str:
        """The text that the tokens after the last complete character add."""
        done = self._ends[-1]
        context = next((end for end in reversed(self._ends) if end <= done - _CONTEXT), 0)
        before, after = (
            self._tokenizer.decode(self.tokens[context:end], start=self._start and context == 0)
            for end in (done, len(self.tokens))
        )
        if not after.startswith(before):  # an invalid byte makes some decoders drop complete characters before it
            return self._tokenizer.decode(self.tokens[done:], start=False)
        return after[len(before) :]

    def _num_withheld(self) -> int:
        """Characters at the end of the text that a stop string begins with."""
        lengths = (n for stop in self._stop for n in range(len(stop) - 1, 0, -1) if self._text.endswith(stop[:n]))
        return max(lengths, default=0)

    def _return_up_to(self, end: int) -> str:
        text = self._text[self._num_returned : end]
        self._num_returned = max(self._num_returned, end)
        return text
