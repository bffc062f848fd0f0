"""Chat messages as the prompt that an instruct model reads: its own template, up to where its answer begins.

The prompt is a text like any other, and reads back as the very tokens of the template. What a message says stays inside
its turn: where it spells one of the tokenizer's special tokens, an invisible character is put into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from editors.errors import ChatRefused, NoChatTemplate

Role = Literal["system", "user", "assistant"]
JOINER = "\N{WORD JOINER}"


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """What the model reads before it answers. Raises NoChatTemplate; ChatRefused, also by the template itself."""
    if not tokenizer.chat_template:
        raise NoChatTemplate(
            "this model's tokenizer has no chat template; give a prompt, or serve an instruct model", field="messages"
        )
    special = _Special(tokenizer)
    contained = [asdict(message) | {"content": special.kept_out_of(message.content)} for message in messages]
    try:
        prompt = tokenizer.apply_chat_template(contained, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError) as error:
        raise ChatRefused(f"the model's chat template refuses these messages: {error}", field="messages") from error
    bos = tokenizer.bos_token
    if bos and prompt.startswith(bos) and tokenizer(bos).input_ids[:2] == [tokenizer.bos_token_id] * 2:
        return prompt.removeprefix(bos)  # one is the template's and one the tokenizer's own
    return prompt


def question_of(tokenizer: PreTrainedTokenizerBase, prompt: str, messages: Sequence[Message]) -> slice:
    """Which characters of the prompt that `messages` make are the last one's; all where the template rewrites it.

    It ends where the prompt begins to differ, seen from its end, from that of a message which ends otherwise: the words
    of the template may well be the message's, too.
    """
    content = _Special(tokenizer).kept_out_of(messages[-1].content)
    asked = content.strip()
    otherwise = content.replace(asked, "b" if asked.endswith("a") else "a")
    other = chat_prompt(tokenizer, (*messages[:-1], Message("user", otherwise)))
    behind = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(prompt), reversed(other), strict=False))
    end = len(prompt) - sum(1 for _ in behind)
    begin = end - len(asked)
    return slice(begin, end) if begin >= 0 and prompt[begin:end] == asked else slice(0, len(prompt))


class _Special:
    """A tokenizer's special tokens, but for the one that stands for whatever has no token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        self._tokens = {index: token for index, token in (added | named).items() if index != tokenizer.unk_token_id}
        self._spelt = self._forms(self._tokens.values())

    def kept_out_of(self, content: str) -> str:
        """The content without any of them in it. Raises ChatRefused where they cannot be kept out."""
        if self._are_in(content):
            for token in sorted(self._tokens.values(), key=len, reverse=True):
                content = content.replace(token, token[:1] + JOINER + token[1:])
            if self._are_in(content):
                raise ChatRefused(
                    "a message holds a special token of the model, which would end its turn; leave it out",
                    field="messages",
                )
        return content

    def _are_in(self, content: str) -> bool:
        """Only what spells one of them is worth to be tokenised for it."""
        if not any(token in form for form in self._forms([content]) for token in self._spelt):
            return False
        return not self._tokens.keys().isdisjoint(self._tokenizer(content, add_special_tokens=False).input_ids)

    def _forms(self, texts: Iterable[str]) -> set[str]:
        """Texts as they are, and as the tokenizer rewrites them before it looks for tokens."""
        normalizer = self._tokenizer.backend_tokenizer.normalizer
        return {form for text in texts for form in (text, normalizer.normalize_str(text) if normalizer else text)}
