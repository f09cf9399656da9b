"""Tokens into text as they come: no half characters, and nothing that may turn out to be a stop string."""

from collections.abc import Sequence

from msn_jax.data.tokenizer import Tokenizer

_CONTEXT = 8  # tokens decoded again in front of new ones: how a token is spelled may depend on those before it
_INCOMPLETE = "\ufffd"  # what the first bytes of a character are decoded to


class TextStream:
    """The text of one answer, growing.

    `push` returns what is certain. The pieces of all calls and of `finish` together are the answer's text, the same
    however the tokens were dealt to the calls.
    """

    def __init__(self, tokenizer: Tokenizer, start: bool, stop: Sequence[str] = ()):
        """`start` is False where the answer continues a text; `stop` are the texts that end it."""
        self.tokens: list[int] = []  # those that count
        self.stopped = False  # a stop string was found: the text ends before it
        self._tokenizer, self._start, self._stop = tokenizer, start, tuple(stop)
        self._text = ""  # of the tokens before the last of `_ends`, complete characters
        self._ends = [0]  # numbers of tokens behind which a character ended
        self._shown = 0  # characters of the text that were returned

    def push(self, tokens: Sequence[int]) -> str:
        """Takes new tokens, and returns the text that is now certain. Tokens behind a stop string are dropped."""
        # So that the token that completes a stop string is the last; and a byte that makes no character may change
        # how a decoder spells those around it, but not what a dealing shows of them.
        one_by_one = self._stop or _INCOMPLETE in self._tokenizer.decode(tokens, start=False)
        for token in tokens:
            if self.stopped:
                break
            self.tokens.append(token)
            if one_by_one:
                self._take()
        self._take()
        end = len(self._text) - (0 if self.stopped else self._held_back())
        return self._show(end)

    def finish(self) -> str:
        """The rest of the text, with U+FFFD for a character that was never completed."""
        self._take(whole=True)
        return self._show(len(self._text))

    def _take(self, whole: bool = False) -> None:
        """Adds the new tokens to the text, if it then ends with a complete character or is to be `whole`."""
        new = "" if self.stopped else self._new()
        if not new or (new.endswith(_INCOMPLETE) and not whole):
            return
        longest = max(map(len, self._stop), default=0)
        before = max(len(self._text) - longest, 0)  # a stop string may have begun in what was there
        self._text += new
        self._ends.append(len(self.tokens))
        found = [at for at in (self._text.find(stop, before) for stop in self._stop) if at >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True

    def _new(self) -> str:
        """What the tokens behind the complete characters add to the text."""
        done = self._ends[-1]
        context = next((end for end in reversed(self._ends) if end <= done - _CONTEXT), 0)
        before, after = (
            self._tokenizer.decode(self.tokens[context:end], start=self._start and context == 0)
            for end in (done, len(self.tokens))
        )
        if not after.startswith(before):  # a broken character makes some decoders give up whole ones before it
            return self._tokenizer.decode(self.tokens[done:], start=False)
        return after[len(before) :]

    def _held_back(self) -> int:
        """Characters at the end of the text with which a stop string begins."""
        lengths = (n for stop in self._stop for n in range(len(stop) - 1, 0, -1) if self._text.endswith(stop[:n]))
        return max(lengths, default=0)

    def _show(self, end: int) -> str:
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece
