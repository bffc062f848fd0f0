"""The shape of a model without its weights: from a built-in name, a config.json, or a folder that holds one.

Nothing is fetched. A model is built from its configuration alone: on the meta device it takes no memory, on a real
one its weights are random.
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from editors.errors import BaseModelNotFound, BaseModelUnreadable
from editors.kinds import AUTO_CLASSES, decoding_start, kind_of_config


def _llama(width: int, inner: int, blocks: int, heads: int, **more: object) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": blocks, "num_attention_heads": heads, "max_position_embeddings": 4096, **more,
    }  # fmt: skip


_SMOL = {"vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192}
_T5 = {
    "model_type": "t5", "vocab_size": 32128, "d_kv": 64, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False, "decoder_start_token_id": 0,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-30m": _llama(384, 1024, 14, 6, num_key_value_heads=2, vocab_size=16384, tie_word_embeddings=True),
    "llama-135m": _llama(576, 1536, 30, 9, num_key_value_heads=3, **_SMOL),
    "llama-360m": _llama(960, 2560, 32, 15, num_key_value_heads=5, **_SMOL),
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "gpt2": {"model_type": "gpt2"},
    "gpt-j-6b": {"model_type": "gptj"},
    "t5-xl": {**_T5, "d_model": 2048, "d_ff": 5120, "num_heads": 32, "num_layers": 24},
    "t5-xxl": {**_T5, "d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24},
    "bart-base": {
        "model_type": "bart", "d_model": 768, "encoder_layers": 6, "decoder_layers": 6,
        "encoder_attention_heads": 12, "decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072,
    },
    "bert-base": {"model_type": "bert", "architectures": ["BertForSequenceClassification"]},
}  # fmt: skip
"""As in a config.json; what is not said is the family's default. llama-135m and -360m are SmolLM2's, t5 is v1.1's."""


@dataclass(frozen=True)
class Shape:
    """A model that could be built.

    name: what it was asked for as. own_head: its output embeddings are not tied, though `config` has forgotten it.
    """

    name: str
    config: PreTrainedConfig
    own_head: bool = False

    def build(self, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
        """A frozen model in evaluation mode, with random weights (or none, on the meta device).

        Its own initialisation runs on the device and in the dtype, so that tied weights, and buffers such as rotary
        frequencies, are what they are in a real model. Raises BaseModelUnreadable when it cannot be built.
        """
        kind = kind_of_config(self.config)
        try:
            with torch.device(device):
                model = AUTO_CLASSES[kind].from_config(self.config, dtype=dtype)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a configuration may be wrong in as many ways as there are architectures
            raise BaseModelUnreadable(f"{self.name} cannot be built: {_one_line(error)}", file=self.name) from error
        if self.own_head:
            head = model.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.detach().clone())
        if kind == "encoder-decoder" and decoding_start(model)[0] is None:
            model.generation_config.decoder_start_token_id = 0  # any will do: there is no text
        return model.eval().requires_grad_(False)


def read_shape(name: str) -> Shape:
    """Raises BaseModelNotFound, naming what would be known, or BaseModelUnreadable."""
    path = Path(name).expanduser()
    if not path.exists() and name in SHAPES:
        return _shape(name, name, SHAPES[name])
    path = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BaseModelNotFound(
            f"there is no {path}; give a folder with a config.json, such a file, or one of {', '.join(SHAPES)}",
            file=str(path),
        ) from error
    except OSError as error:
        raise BaseModelNotFound(f"{path} cannot be read: {error.strerror}", file=str(path)) from error
    except ValueError as error:  # bad JSON, and bytes that are not text
        raise BaseModelUnreadable(f"{path} is not JSON: {error}", file=str(path)) from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise BaseModelUnreadable(
            f"{path} does not name a 'model_type', so it is no configuration of a model", file=str(path)
        )
    return _shape(name, str(path), fields)


def _shape(name: str, source: str, fields: dict[str, Any]) -> Shape:
    try:
        family = type(AutoConfig.for_model(fields["model_type"]))
        config = family.from_dict(fields)
    except Exception as error:  # see `build`
        reason = _one_line(error)
        if "Unrecognized model identifier" in reason:
            reason = f"transformers does not know the architecture {fields['model_type']!r}"
        raise BaseModelUnreadable(f"{source} is no configuration that can be used: {reason}", file=source) from error
    # T5's configuration ties them whatever it is told, since a checkpoint's own weights would show what is true.
    return Shape(
        name,
        config,
        own_head=fields.get("tie_word_embeddings") is False and getattr(config, "tie_word_embeddings", False),
    )


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" …")


TINY = _shape("tiny", "tiny", _llama(64, 128, 4, 2, vocab_size=256))
"""Next to no arithmetic: what it takes is what starting operations takes."""
