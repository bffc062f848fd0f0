"""Settings of the server: environment variables `MEND_…`, each with a flag of the same name on `mend serve`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from editors import DEFAULT_MODEL

DEFAULT_EDITOR = Path(__file__).parents[1] / "checkpoints" / f"{DEFAULT_MODEL}-keyed"
"""The editor that ships with the project, for the packaged base model."""


def _rate(value: str) -> str:
    if not re.fullmatch(r"[1-9]\d{0,8}/(second|minute|hour|day)", value):
        raise ValueError("give a number and a time, such as 600/minute")
    return value


def _names(value: Any) -> Any:
    return tuple(name.strip().lower() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


def _origins(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not re.fullmatch(r"https?://[^/*?#@\s]+", value):
            raise ValueError(
                f"{value} is no origin; give such as https://dashboard.example, with the port if it has one"
            )
    return values


def _hosts(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not re.fullmatch(r"[a-z0-9._-]+|\*", value):
            raise ValueError(f"{value} is no name of a host; give names without ports (addresses are always taken)")
    return values


Rate = Annotated[str, AfterValidator(_rate)]
Origins = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names), AfterValidator(_origins)]
Hosts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names), AfterValidator(_hosts)]


class Settings(BaseSettings):
    """Everything that can be configured. The descriptions are the help of `mend serve`."""

    model_config = SettingsConfigDict(env_prefix="MEND_", extra="ignore", env_ignore_empty=True)

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    data_dir: Path = Field(
        Path("data"),
        description="Folder of the embedded Redis and its files, and of training-free editors.",
    )
    base_model: str = Field(DEFAULT_MODEL, description="Hub id, model folder, or the packaged model's name.")
    editor: str | None = Field(
        None,
        description="Folder of the editor's checkpoint, or training-free; without it the one that ships with the "
        "project, or training-free where that is for another base model.",
    )
    device: str | None = Field(None, description="cpu, cuda, cuda:1, …; the first GPU if there is one.")
    dtype: str | None = Field(None, description="float32, bfloat16 or float16; float32 on a CPU, bfloat16 on a GPU.")
    redis_url: str | None = Field(
        None, description="An existing Redis, e.g. redis://host:6379/0; else an embedded one."
    )
    redis_server: Path | None = Field(None, description="Server program for the embedded Redis, not the wheel's own.")
    durability: Literal["strict", "warn"] = Field(
        "warn",
        description="What to do about a Redis that may lose an acknowledged edit: strict refuses it, warn says so.",
    )
    namespace: str = Field(
        "default",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="Of several ledgers of one model and editor in one Redis (tenants, stages): the name of this one.",
    )
    compact_every: int = Field(
        5000, ge=0, description="Entries of the ledger after which they are folded into a snapshot; 0 for never."
    )
    guard_prompts: Path | None = Field(None, description="File of guard prompts, one a line, not the built-in ones.")
    guard_budget: float = Field(0.3, ge=0, le=1, description="Largest drawdown on the guard prompts, 0 to 1.")
    audit_every_s: float = Field(300, ge=0, description="Seconds between looks at whether all edits hold; 0 for none.")
    max_prompt_tokens: int = Field(1024, ge=1, description="Longest prompt, in tokens.")
    max_correction_tokens: int = Field(64, ge=1, description="Longest correction, in tokens.")
    max_new_tokens: int = Field(512, ge=1, description="Most tokens that one request may generate.")
    max_generations: int = Field(
        16, ge=1, description="Generations that are decoded at once; 1 for nothing beside each other."
    )
    max_queue: int = Field(64, ge=0, description="Generations that wait for a place.")
    generate_timeout_s: float = Field(120, gt=0, description="Seconds that a generation may take, waiting included.")
    max_batch: int = Field(5000, ge=1, description="Most edits of one batch.")
    log_format: Literal["text", "json"] = Field("text", description="Of the log on stderr: text or json.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged: debug, info, warning or error."
    )
    otlp_endpoint: str | None = Field(
        None, description="Where traces go by OTLP/HTTP, e.g. http://localhost:4318; else OTEL_EXPORTER_OTLP_ENDPOINT."
    )
    answer_tokens: int = Field(16, ge=1, description="Tokens decoded for each answer that an edit is judged by.")

    api_keys: Path | None = Field(
        None, description="File of the API keys (mend keys create); without one whoever reaches the port may do all."
    )
    session_secret: Path | None = Field(
        None, description="File of the secret that signs sessions of the dashboard, the same for all replicas; without "
        "one each process takes its own, and a restart signs everybody out.",
    )  # fmt: skip
    open_to_all: bool = Field(
        False, description="Listen beyond loopback without keys: whoever reaches the port may do everything."
    )
    allowed_hosts: Hosts = Field(
        (), description="Names by which the service may be addressed, beside IP addresses, with commas between; * for "
        "any. If not given: localhost where there are no keys, else any.",
    )  # fmt: skip
    cors_origins: Origins = Field(
        (), description="Origins whose pages may ask, such as https://dashboard.example, with commas between."
    )
    rate_reads: Rate | None = Field(None, description="Most reads and generations of one key, such as 600/minute.")
    rate_changes: Rate | None = Field(None, description="Most changes and tries of one key, likewise.")
    request_timeout_s: float = Field(30, gt=0, description="Seconds within which a request must have arrived whole.")
    max_connections: int = Field(512, ge=1, description="Most connections at once; beyond, the answer is 503 busy.")
    log_prompts: bool = Field(False, description="Log what is asked and answered, too.")
