"""From tokens to words while a text is still being written: what is sure of it, and how each token is spelt."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from editors.decoding import ends_of
from editors.kinds import kind_of, label_names

UNSURE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for the first bytes of a character whose last bytes are still to come."""
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Wording:
    """How a model's tokens read; a classifier's are its labels.

    ends: tokens that end a text and are not part of it. one_word: whether a text has one token only.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.one_word = kind_of(model) == "classifier"
        self._labels = label_names(model) if self.one_word else []
        self.ends = frozenset() if self.one_word else frozenset(ends_of(model, tokenizer))
        decoder = getattr(tokenizer.backend_tokenizer, "decoder", None)
        self._bytes = {}
        if decoder is not None and b'"ByteLevel"' in decoder.__getstate__():
            self._bytes = {character: byte for byte, character in bytes_to_unicode().items()}
        self.spell = functools.cache(self._spell)

    def text(self, tokens: Sequence[int]) -> str:
        if self.one_word:
            return "".join(self._labels[token] for token in tokens)
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _spell(self, token: int) -> bytes:
        """One token's own bytes, which may be a part of a character only."""
        if self.one_word:
            return self._labels[token].encode()
        written = self._tokenizer.convert_ids_to_tokens(token)
        if written is None:  # models may have more scores than tokens
            return b""
        if byte := BYTE.fullmatch(written):
            return bytes([int(byte[1], 16)])
        if token not in self._tokenizer.added_tokens_decoder and self._bytes and set(written) <= self._bytes.keys():
            return bytes(self._bytes[character] for character in written)
        return written.replace("▁", " ").encode()


class Words:
    """What a text says so far. sure: what stays as it is, which ends before the stop string that is complete first.

    Held back are parts of characters, and what may still turn out to be a stop string.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self.sure, self.stopped = "", False

    def read(self, text: str, *, last: bool = False) -> str:
        """What is newly sure of a text that has grown. last: it grows no more."""
        if not last:
            text = text.rstrip(UNSURE)
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            text, self.stopped = text[: min(found)[1]], True
        elif not last:
            text = text[: len(text) - self._held(text)]
        new = text[len(self.sure) :]
        self.sure += new
        return new

    def _held(self, text: str) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        return next(
            (size for size in range(min(longest, len(text)), 0, -1) if text.endswith(self._beginnings(size))), 0
        )

    def _beginnings(self, size: int) -> tuple[str, ...]:
        return tuple(stop[:size] for stop in self._stop if len(stop) > size)
