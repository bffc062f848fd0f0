"""One prompt continued alone, step by step, as the service does."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors.continuation import Continuation, Piece, Wish
from editors.decoding import Generation
from editors.kinds import encode_for
from editors.sampling import Sampling
from editors.stepping import rows_of
from editors.wording import Wording


def say(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling | None = None,
) -> Generation:
    wish = Wish(max_new_tokens, sampling or Sampling())
    text, pieces = continued(model, tokenizer, encode_for(model, tokenizer, prompt).prompt, wish)
    said = "".join(piece.text for piece in pieces)
    return Generation(said, text.finish_reason, len(text.prompt), len(text.said))


def continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], wish: Wish
) -> tuple[Continuation, list[Piece]]:
    """The text at its end, and the pieces that it was told in."""
    text = Continuation(Wording(model, tokenizer), ids, wish)
    rows = rows_of(model)(model, [ids])
    pieces = [text.take(rows.scores[0], int(rows.scores[0].argmax()))]
    while text.finish_reason is None:
        rows.step(text.said[-1:])
        pieces.append(text.take(rows.scores[0], int(rows.scores[0].argmax())))
    return text, [piece for piece in pieces if piece]
