"""The three kinds of model that can be edited, and how each reads a prompt and says its answer.

- decoder: the answer follows the prompt in one text (GPT-2, Llama, …)
- encoder-decoder: the encoder reads the prompt, the decoder writes the answer (T5, BART)
- classifier: the whole prompt is read, and one label is chosen (BERT)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from editors.errors import BaseModelUnreadable, EmptyTextError, UnknownLabel
from editors.text import (
    LabelledTokens,
    Seq2SeqTokens,
    Tokens,
    begins_with,
    encode,
    encode_answer,
    question_positions,
    subject_position,
)

Kind = Literal["decoder", "encoder-decoder", "classifier"]

AUTO_CLASSES = {
    "decoder": AutoModelForCausalLM,
    "encoder-decoder": AutoModelForSeq2SeqLM,
    "classifier": AutoModelForSequenceClassification,
}
CLASSIFIER = "ForSequenceClassification"
OTHER_HEADS = ("ForMaskedLM", "ForPreTraining", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
FEVER_LABELS = {"REFUTES": 0, "SUPPORTS": 1}
"""What the labels of fact checking mean to a binary classifier that does not name its own, as in MEND's own data."""


def kind_of_config(config: PreTrainedConfig) -> Kind:
    """What a saved model is. Raises BaseModelUnreadable when it is none of the three."""
    architectures = config.architectures or []
    if any(name.endswith(CLASSIFIER) for name in architectures):
        if config.is_encoder_decoder:
            raise BaseModelUnreadable(
                f"a {architectures[0]} classifies by an encoder-decoder, which is not supported; "
                "give a classifier of one stack of blocks, such as BERT",
                architecture=architectures[0],
            )
        return "classifier"
    if any(name.endswith(OTHER_HEADS) for name in architectures):
        raise BaseModelUnreadable(
            f"a {architectures[0]} neither writes text nor chooses one label for it; "
            f"give a causal model, an encoder-decoder with a language head, or a …{CLASSIFIER}",
            architecture=architectures[0],
        )
    return "encoder-decoder" if config.is_encoder_decoder else "decoder"


def kind_of(model: nn.Module) -> Kind:
    """What a loaded model is."""
    if type(model).__name__.endswith(CLASSIFIER):
        return "classifier"
    return "encoder-decoder" if model.config.is_encoder_decoder else "decoder"


def decoding_start(model: nn.Module) -> tuple[int, ...]:
    """Tokens that an encoder-decoder's text begins with before the model has a choice."""
    settings = model.generation_config
    start = settings.decoder_start_token_id
    start = settings.bos_token_id if start is None else start
    forced = settings.forced_bos_token_id
    return (start,) if forced is None else (start, forced)


def tokens(model: nn.Module, prompt: tuple[int, ...], target: tuple[int, ...] = ()) -> Tokens:
    """The sequence that this kind of model reads for a prompt and a target."""
    kind = kind_of(model)
    if kind == "encoder-decoder":
        return Seq2SeqTokens(prompt, target, decoding_start(model))
    return (LabelledTokens if kind == "classifier" else Tokens)(prompt, target)


def encode_for(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    correction: str | None = None,
    subject: str | None = None,
    question: slice | None = None,
) -> Tokens:
    """Tokenise a prompt and its correction for this kind of model.

    subject: the part of the prompt that the correction is about. question: characters of the prompt in which it is.
    Raises EmptyTextError when prompt or correction has no tokens, UnknownLabel when a classifier has no such label,
    SubjectNotFound.
    """
    encoded = _encode(model, tokenizer, prompt, correction)
    if question is not None:
        encoded = replace(encoded, question=question_positions(tokenizer, prompt, question))
    if subject is not None:
        position = subject_position(tokenizer, prompt, subject, question or slice(None))
        encoded = replace(encoded, subject=position)
    return encoded


def _encode(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, correction: str | None) -> Tokens:
    kind = kind_of(model)
    if kind == "decoder":
        return encode(tokenizer, prompt, correction)
    # These tokenizers mark the end of a text, so that even an empty one has tokens.
    if not tokenizer(prompt, add_special_tokens=False).input_ids:
        raise EmptyTextError("the prompt has no tokens", field="prompt")
    ids = tuple(tokenizer(prompt).input_ids)
    if correction is None:
        return tokens(model, ids)
    answer = encode_answer(tokenizer, correction) if kind == "encoder-decoder" else (label_id(model, correction),)
    return tokens(model, ids, answer)


def label_names(model: nn.Module) -> list[str]:
    """A classifier's labels, in the order of its logits."""
    return [model.config.id2label[index] for index in range(model.config.num_labels)]


def label_id(model: nn.Module, name: str) -> int:
    """Index of a label, by its name (case aside) or its number. Raises UnknownLabel."""
    wanted = name.strip()
    names = label_names(model)
    by_name = {label.upper(): index for index, label in enumerate(names)}
    if set(by_name) == {"LABEL_0", "LABEL_1"}:
        by_name |= FEVER_LABELS
    by_name = {str(index): index for index in range(len(names))} | by_name
    try:
        return by_name[wanted.upper()]
    except KeyError:
        raise UnknownLabel(
            f"{wanted!r} is no label of this classifier; its labels are {', '.join(names)}",
            field="correction",
            labels=names,
        ) from None


def says(model: nn.Module, text: str, correction: str) -> bool:
    """Whether a decoded answer says the correction; a classifier's label may be called by another of its names."""
    if kind_of(model) == "classifier":
        return label_id(model, text) == label_id(model, correction)
    return begins_with(text, correction)
