"""Chat messages as the prompt that an instruct model reads: its own template, up to where its answer begins.

The prompt is a text like any other, and reads back as the very tokens of the template. What a message says stays inside
its turn: where it spells one of the tokenizer's special tokens, an invisible character is put into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
    contained = [asdict(message) | {"content": _contained(tokenizer, message.content)} for message in messages]
    try:
        prompt = tokenizer.apply_chat_template(contained, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError) as error:
        raise ChatRefused(f"the model's chat template refuses these messages: {error}", field="messages") from error
    bos, ids = tokenizer.bos_token_id, tokenizer(prompt).input_ids
    if bos is not None and ids[:2] == [bos, bos]:  # one is the template's and one the tokenizer's own
        prompt = prompt.removeprefix(tokenizer.bos_token)
    return prompt


def question_of(tokenizer: PreTrainedTokenizerBase, prompt: str, messages: Sequence[Message]) -> slice:
    """Which characters of the prompt that `messages` make are the last one's; all where the template rewrites it."""
    content = _contained(tokenizer, messages[-1].content).strip()
    begin = prompt.rfind(content)
    return slice(begin, begin + len(content)) if begin >= 0 else slice(0, len(prompt))


def _contained(tokenizer: PreTrainedTokenizerBase, content: str) -> str:
    """The content without special tokens in it. Raises ChatRefused where they cannot be kept out."""
    if _has_special(tokenizer, content):
        for token in sorted(_special(tokenizer).values(), key=len, reverse=True):
            content = content.replace(token, token[:1] + JOINER + token[1:])
        if _has_special(tokenizer, content):
            raise ChatRefused(
                "a message holds a special token of the model, which would end its turn; leave it out", field="messages"
            )
    return content


def _has_special(tokenizer: PreTrainedTokenizerBase, content: str) -> bool:
    return not _special(tokenizer).keys().isdisjoint(tokenizer(content, add_special_tokens=False).input_ids)


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """But for the one that stands for whatever has no token."""
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {index: token for index, token in (added | named).items() if index != tokenizer.unk_token_id}
