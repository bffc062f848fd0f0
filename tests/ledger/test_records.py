"""An entry reads back as it was written, or is not written."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from service.ledger import Applied, EntryInvalid, InBatch
from service.ledger.records import decode, encode
from tests.ledger.entries import FACTORS, STATE, applied, batch, rolled_back

texts = st.text(st.characters(exclude_categories=["Cs"]))
floats = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def nested(depth: int) -> Any:
    value: Any = "core"
    for _ in range(depth):
        value = [value]
    return value


class TestRoundTrip:
    @settings(max_examples=60, deadline=None)
    @given(
        text=texts,
        paraphrases=st.lists(texts, max_size=3),
        metadata=st.dictionaries(texts, json_values, max_size=3),
        scale=floats,
        timings_ms=st.dictionaries(texts, floats, max_size=3),
        created_at=st.datetimes(timezones=st.just(UTC)),
    )
    def test_gives_back_any_unicode_any_json_and_every_bit_of_a_float(
        self,
        text: str,
        paraphrases: list[str],
        metadata: dict[str, Any],
        scale: float,
        timings_ms: dict[str, float],
        created_at: datetime,
    ) -> None:
        entry = applied(
            1,
            prompt=text,
            subject=text,
            actor=text,
            paraphrases=paraphrases,
            metadata=metadata,
            scale=scale,
            timings_ms=timings_ms,
            created_at=created_at,
        )
        assert decode(encode(entry)) == entry
        assert encode(decode(encode(entry))) == encode(entry)

    def test_keeps_the_kind(self) -> None:
        entry = rolled_back(2, reason="wrong tower")
        assert decode(encode(entry)) == entry
        assert decode(encode(entry)).kind == "rolled_back"


class TestAnOlderEntry:
    def test_reads_as_one_that_supersedes_nothing(self) -> None:
        fields = json.loads(encode(applied(1)))
        del fields["supersedes"], fields["batch"]
        assert decode(json.dumps(fields).encode()) == applied(1, created_at=fields["created_at"])


class TestRefused:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize(
        "field", ["scale", "timings_ms", "metadata", "checks"], ids=["scale", "timings", "metadata", "checks"]
    )
    def test_numbers_that_json_does_not_have(self, field: str, value: float) -> None:
        with pytest.raises(ValidationError):
            applied(1, **{field: value if field == "scale" else {"x": value}})

    @pytest.mark.parametrize(
        "fields",
        [
            {"sequence": 0},
            {"created_at": datetime(2026, 1, 1)},  # noqa: DTZ001
            {"created_at": datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=2)))},
            {"state_digest": "md5:0"},
            {"surprise": 1},
        ],
        ids=["sequence", "naive", "not_utc", "digest", "extra_field"],
    )
    def test_fields_that_are_not_what_they_claim(self, fields: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            applied(1, **fields)

    @pytest.mark.parametrize(
        "fields",
        [{"prompt": "\ud800"}, {"metadata": {"x": "\ud800"}}, {"metadata": {"\ud800": 1}}],
        ids=["text", "value", "key"],
    )
    def test_half_a_surrogate_pair_is_refused_before_it_is_stored(self, fields: dict[str, Any]) -> None:
        with pytest.raises(EntryInvalid) as refused:
            encode(applied(7, **fields))
        assert refused.value.facts["sequence"] == 7

    def test_whatever_depth_of_nesting_is_accepted_can_be_read_back(self) -> None:
        accepted = 0
        for depth in (10, 50, 100, 150, 190, 200, 210, 250, 300):
            try:
                raw = encode(applied(1, metadata={"x": nested(depth)}))
            except (ValidationError, EntryInvalid):
                continue
            entry = decode(raw)
            assert isinstance(entry, Applied)
            assert entry.metadata == {"x": nested(depth)}
            accepted += 1
        assert accepted >= 3

    @pytest.mark.parametrize("raw", [b"", b"{", b"null", b'{"kind":"superseded"}', b"\xff"])
    def test_bytes_that_are_no_entry_say_so_in_one_line(self, raw: bytes) -> None:
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            decode(raw)


class TestABatch:
    def test_reads_back(self) -> None:
        (first, _), (last, _) = batch(1, [FACTORS] * 2)
        last = last.model_copy(
            update={"batch": last.batch.model_copy(update={"left_out": {3: {"status": "unchanged"}}})}
        )
        for entry in (first, last):
            assert decode(encode(entry)) == entry
        assert (first.state_digest, last.state_digest) == (None, STATE)

    @pytest.mark.parametrize(
        ("position", "state_digest"), [(None, None), (1, STATE), (2, None)], ids=["alone", "inside", "end"]
    )
    def test_has_a_state_at_its_end_alone(self, position: int | None, state_digest: str | None) -> None:
        place = position and InBatch(id="x", position=position, size=2)
        with pytest.raises(ValidationError):
            applied(1, batch=place, state_digest=state_digest)


class TestFrozen:
    def test_an_entry_cannot_be_changed_after_the_fact(self) -> None:
        with pytest.raises(ValidationError):
            applied(1).prompt = "another"
