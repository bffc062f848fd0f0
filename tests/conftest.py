"""Fixtures that every folder of tests may use; what they are made of is in `tests.small`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import PreTrainedModel

from editors.base_model import BaseModel
from service.ledger import EmbeddedRedis
from tests.small import SMALL_MODELS, small_base


@pytest.fixture(params=SMALL_MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A random model whose weights are laid out as Linear, then as Conv1D."""
    return SMALL_MODELS[request.param]()


@pytest.fixture(params=SMALL_MODELS)
def base(request: pytest.FixtureRequest) -> BaseModel:
    """A random model with its tokenizer, in both layouts."""
    return small_base(request.param)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """One server for all tests that leave it as it was."""
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server
