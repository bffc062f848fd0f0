"""What is documented is what is answered."""

from __future__ import annotations

import json

import pytest

from service.app import create_app
from service.settings import Settings
from tests.conformance.__main__ import conform
from tests.conformance.snapshot import SNAPSHOT

SECONDS = 15


def test_the_document_is_the_one_that_is_committed():
    """After a change that is wanted: python -m tests.conformance --snapshot"""
    assert create_app(Settings()).openapi() == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


@pytest.mark.timeout(240)
def test_every_answer_is_as_documented_and_none_a_mistake_of_the_service(tmp_path, capfd):
    status = conform(tmp_path, SECONDS)
    assert status == 0, capfd.readouterr().out
