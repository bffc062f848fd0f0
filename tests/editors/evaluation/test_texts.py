"""Running text is cut into pieces of one length; what cannot be read is refused."""

from __future__ import annotations

import pytest

from editors.errors import DataFileError
from editors.evaluation.texts import CHUNK_TOKENS, MAX_CHUNKS, OWN_TEXTS, own_text, read_text
from tests.editors.evaluation.bases import KINDS, base_of


class TestReadText:
    def test_cuts_whole_pieces_and_leaves_the_rest(self, tmp_path):
        base = base_of("decoder")
        text = "The capital of France is Paris. " * 60
        (tmp_path / "text.txt").write_text(text)
        pieces = read_text(base, tmp_path / "text.txt")
        ids = base.tokenizer(text).input_ids
        assert len(pieces) == len(ids) // CHUNK_TOKENS > 1
        assert [token for piece in pieces for token in piece.prompt + piece.target] == ids[: len(pieces) * CHUNK_TOKENS]
        assert {len(piece.prompt) for piece in pieces} == {1}

    def test_takes_a_short_text_whole_and_a_long_one_in_part(self, tmp_path):
        base = base_of("decoder")
        (tmp_path / "short.txt").write_text("The city")
        assert [len(piece.target) for piece in read_text(base, tmp_path / "short.txt")] == [1]
        (tmp_path / "long.txt").write_text("a" * CHUNK_TOKENS * (MAX_CHUNKS + 3))
        assert len(read_text(base, tmp_path / "long.txt")) == MAX_CHUNKS

    @pytest.mark.parametrize("kind", ["encoder-decoder", "classifier"])
    def test_is_for_decoders(self, tmp_path, kind):
        with pytest.raises(DataFileError, match=f"only a decoder continues .* of the kind {kind}; leave --text out"):
            read_text(base_of(kind), tmp_path / "text.txt")


@pytest.mark.parametrize("kind", KINDS)
def test_own_texts_are_of_one_length_and_follow_the_seed(kind):
    base = base_of(kind)
    texts = own_text(base, 1)
    assert len(texts) == (0 if kind == "classifier" else OWN_TEXTS)
    assert len({len(text.target) for text in texts}) <= 1
    assert texts == own_text(base, 1)
    assert not texts or texts != own_text(base, 2)
