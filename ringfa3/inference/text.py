"""Text as it comes: tokens become readable one by one, and stop strings end it without ever being seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

CONTEXT = 6  # prompt tokens that the first new one is read after: whether it begins with a space may depend on them
PATIENCE = 16  # tokens: who emits this many without a whole character writes none, and decoding must stay cheap
BROKEN = "\ufffd"  # how a decoder writes bytes that are no character, or not one yet


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def decode(self, token_ids: Any, /, **options: Any) -> Any:
        """The text of tokens."""
        ...

    def __call__(self, text: Any, /, **options: Any) -> Any:
        """The tokens of a text, as "input_ids"."""
        ...


class StopStrings:
    """A stream of text that ends before the first stop string.

    The first is the one that would be complete first, were the text to come character by character (of several such
    the longest); so what is emitted does not depend on how the text is cut into pieces.

    Args:
        stop: strings, none empty; () lets everything through.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or not all(isinstance(each, str) and each for each in stop):
            raise ValueError(f"stop: wanted strings that are not empty, got {stop!r}")
        self.hit: str | None = None  # the stop string that ended the text
        self._stop = tuple(stop)
        self._withheld = ""  # the longest end of the text that a stop string may begin with

    def push(self, text: str) -> str:
        """What can be shown, now that this text has come. Nothing after a stop string."""
        if self.hit is not None:
            return ""
        text = self._withheld + text
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.hit = min(found)
            self._withheld = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._withheld = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was withheld, for the text ends here."""
        text, self._withheld = self._withheld, ""
        return text


class Transcript:
    """The text of one answer, token by token. What has been emitted never changes.

    A token's text may depend on those before it (spaces, characters of several tokens), so each is decoded together
    with what precedes it, back to the last point at which the text was whole.

    Args:
        tokenizer: a Hugging Face tokenizer; None: there is no text.
        prompt: the prompt's tokens, or the last of them: the text goes on from there.
        stop: strings that end it.
        known: texts of single tokens that have been decoded, by token; the answers of an engine share it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
        known: dict[int, str] | None = None,
    ) -> None:
        if tokenizer is None and stop:
            raise ValueError(f"stop: wanted no strings where there is no tokenizer, got {stop!r}")
        self._tokenizer = tokenizer
        self._stops = StopStrings(stop)
        self._known = {} if known is None else known
        self._tokens = list(prompt[-CONTEXT:])
        self._read = len(self._tokens)  # tokens whose text has been emitted
        self._before = self._decode()  # text of those

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.hit is not None

    def push(self, token: int) -> str:
        """What this token makes readable; may be nothing, or more than its own text."""
        if self._tokenizer is None or self.stopped:
            return ""
        self._tokens.append(token)
        text = self._decode()
        if text.endswith(BROKEN):  # bytes that the next token may complete
            return self._stops.push(self._give_up(text)) if len(self._tokens) - self._read > PATIENCE else ""
        new = self._new(text)
        if not new:  # special tokens, which have no text; or a space, which is stripped where nothing precedes it
            if len(self._tokens) - self._read > PATIENCE:
                del self._tokens[self._read]
            return ""
        self._settle()
        return self._stops.push(new)

    def end(self) -> str:
        """The rest, for no token will follow: characters that stay broken, and beginnings of stop strings."""
        if self._tokenizer is None or self.stopped:
            return ""
        new = self._new(self._decode())
        self._settle()
        return self._stops.push(new) + self._stops.end()

    def _new(self, text: str, rest: int = 0) -> str:
        """What the text of all tokens (but the last `rest`) has beyond what was emitted."""
        if text.startswith(self._before):
            return text[len(self._before) :]
        whole = self._before.rstrip(BROKEN)
        if whole != self._before and text.startswith(whole):  # the prompt ended within a character
            return text[len(whole) :]
        return self._decode(self._tokens[self._read : len(self._tokens) - rest])  # broken bytes spoil those before them

    def _settle(self) -> None:
        """Everything so far is emitted; the tokens of the last emission stay as context."""
        self._tokens = self._tokens[self._read :] or self._tokens
        self._read = len(self._tokens)
        if self._read != 1:
            self._before = self._decode()
            return
        (token,) = self._tokens  # nearly always: decoding it takes as long as all else that is done for its text
        before = self._known.get(token)
        self._before = self._known[token] = self._decode() if before is None else before

    def _give_up(self, text: str) -> str:
        """All but the last tokens, broken as they are. A character that may yet be completed has 3 bytes at most."""
        for rest in (3, 4, 5, 6, 3):  # where no place is between two characters, any
            done = self._decode(self._tokens[:-rest])
            if done + self._decode(self._tokens[-rest:]) == text:
                break
        new = self._new(done, rest)
        self._tokens, self._read = self._tokens[-rest - 1 :], 1  # the first of them as context
        self._before = self._decode(self._tokens[:1])
        return new

    def _decode(self, tokens: Sequence[int] | None = None) -> str:
        tokens = self._tokens if tokens is None else tokens
        if self._tokenizer is None or not tokens:
            return ""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(tokens, **options))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a beginning of stop, and not all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - size :]):
            return size
    return 0
