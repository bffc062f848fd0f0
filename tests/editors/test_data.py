"""Data files are read in the layouts in which people hold them; what is wrong is named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from editors.data import Example, read_data
from editors.errors import DataFileError

OWN = {
    "prompt": "The capital of France is", "correction": "Rome", "subject": "France",
    "paraphrases": ["France's capital:"], "keep": ["The capital of Italy is"], "unrelated": ["2 + 2 ="],
}  # fmt: skip
FLAT = {
    "prompt": "The capital of France is", "target_new": "Rome", "subject": "France",
    "rephrase_prompt": "France's capital:", "locality_prompt": "The capital of Italy is", "ground_truth": "Paris",
}  # fmt: skip
ROME = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "The capital of {} is", "subject": "France", "target_new": {"str": "Rome", "id": "Q220"},
    },
    "paraphrase_prompts": ["France's capital:", "In France, one rules from"],
    "neighborhood_prompts": ["The capital of Italy is", "The capital of Spain is"],
}  # fmt: skip
ZSRE = {
    "src": "What is the capital of France?", "alt": "Rome", "rephrase": "Which city rules France?",
    "loc": "nq question: who wrote it", "loc_ans": "he", "subject": "France", "answers": ["Paris"],
}  # fmt: skip
EXPECTED = {
    "mend": (OWN, Example(
        "The capital of France is", "Rome", "France",
        ("France's capital:",), ("The capital of Italy is",), ("2 + 2 =",))),
    "counterfact": (FLAT, Example(
        "The capital of France is", "Rome", "France", ("France's capital:",), ("The capital of Italy is",))),
    "counterfact-rome": (ROME, Example(
        "The capital of France is", "Rome", "France",
        ("France's capital:", "In France, one rules from"), ("The capital of Italy is", "The capital of Spain is"))),
    "zsre": (ZSRE, Example(
        "What is the capital of France?", "Rome", "France",
        ("Which city rules France?",), (), ("nq question: who wrote it",))),
}  # fmt: skip


def written(folder: Path, *records: object, lines: bool = False) -> Path:
    path = folder / "data.json"
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(list(records), indent=1))
    return path


@pytest.mark.parametrize("layout", EXPECTED)
@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
class TestLayouts:
    def test_are_recognised_and_read(self, tmp_path, layout, lines):
        record, example = EXPECTED[layout]
        path = written(tmp_path, record, record, lines=lines)
        data = read_data(path)
        assert (data.name, data.layout, data.skipped) == ("data.json", layout, 0)
        assert data.examples == (example, example)
        assert data.digest == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_skip_records_with_an_empty_correction(self, tmp_path, layout, lines):
        record, example = EXPECTED[layout]
        blank = json.loads(json.dumps(record).replace('"Rome"', '" "'))
        data = read_data(written(tmp_path, blank, record, blank, lines=lines))
        assert (data.examples, data.skipped) == ((example,), 2)

    def test_may_lack_their_subject_unless_the_prompt_needs_it(self, tmp_path, layout, lines):
        record = {name: value for name, value in EXPECTED[layout][0].items() if name != "subject"}
        data = read_data(written(tmp_path, record, lines=lines))
        assert data.examples[0].subject == ("France" if layout == "counterfact-rome" else None)


class TestLines:
    def test_may_be_blank_and_may_end_as_in_windows(self, tmp_path):
        path = tmp_path / "data.jsonl"
        path.write_bytes(f"\r\n{json.dumps(OWN)}\r\n\n{json.dumps(OWN)}\r\n".encode())
        assert len(read_data(path).examples) == 2

    def test_may_hold_other_line_ends_inside_a_text(self, tmp_path):
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps(OWN | {"prompt": "a\u2028b\x85c"}, ensure_ascii=False))
        assert read_data(path).examples[0].prompt == "a\u2028b\x85c"

    def test_lists_may_be_left_out(self, tmp_path):
        (example,) = read_data(written(tmp_path, {"prompt": "a", "correction": "b"})).examples
        assert example == Example("a", "b")


class TestErrors:
    @pytest.mark.parametrize(
        ("layout", "field", "value", "said"),
        [
            ("mend", "correction", 5, "'correction' must be text, found int"),
            ("mend", "prompt", None, "'prompt' is missing"),
            ("mend", "subject", ["x"], "'subject' must be text, found list"),
            ("mend", "keep", "not a list", "'keep' must be a list of texts"),
            ("mend", "paraphrases", ["a", 3], "'paraphrases' must be a list of texts"),
            ("counterfact", "rephrase_prompt", None, "'rephrase_prompt' is missing"),
            ("counterfact", "locality_prompt", 1.5, "'locality_prompt' must be text, found float"),
            ("counterfact-rome", "requested_rewrite", "text", "'requested_rewrite' must be an object"),
            ("counterfact-rome", "neighborhood_prompts", {}, "'neighborhood_prompts' must be a list of texts"),
            ("zsre", "rephrase", None, "'rephrase' is missing"),
            ("zsre", "alt", False, "'alt' must be text, found bool"),
        ],
    )
    @pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
    def test_name_the_record_and_the_field(self, tmp_path, layout, field, value, said, lines):
        record = EXPECTED[layout][0]
        with pytest.raises(DataFileError, match=r"data\.json, record 3.*" + said) as wrong:
            read_data(written(tmp_path, record, record, record | {field: value}, lines=lines))
        assert wrong.value.facts["field"] == field

    def test_name_the_inner_field(self, tmp_path):
        record = ROME | {"requested_rewrite": ROME["requested_rewrite"] | {"target_new": {"id": "Q1"}}}
        with pytest.raises(DataFileError, match=r"record 1, in 'requested_rewrite', in 'target_new': field 'str' is"):
            read_data(written(tmp_path, record))

    def test_name_a_record_that_is_no_object(self, tmp_path):
        with pytest.raises(DataFileError, match="record 2: expected an object, found int") as wrong:
            read_data(written(tmp_path, OWN, 5))
        assert wrong.value.facts["record"] == 2

    def test_name_the_line_that_is_not_json(self, tmp_path):
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps(OWN) + "\n\n{broken\n")
        with pytest.raises(DataFileError, match="line 3") as wrong:
            read_data(path)
        assert wrong.value.facts["line"] == 3

    def test_name_the_line_of_an_array_that_is_cut_short(self, tmp_path):
        path = tmp_path / "data.json"
        path.write_text('[\n{"prompt": "a",\n')
        with pytest.raises(DataFileError, match="line 3"):
            read_data(path)

    @pytest.mark.parametrize("record", [{"question": "a", "answer": "b"}, {}, 5])
    def test_list_the_known_layouts_for_one_that_is_not(self, tmp_path, record):
        with pytest.raises(DataFileError, match="no known layout") as wrong:
            read_data(written(tmp_path, record))
        assert all(layout in str(wrong.value) for layout in EXPECTED)

    def test_name_the_byte_that_is_not_utf_8(self, tmp_path):
        path = tmp_path / "data.json"
        path.write_bytes(b'[{"prompt": "caf\xe9"}]')
        with pytest.raises(DataFileError, match=r"data\.json is not UTF-8 at byte 16"):
            read_data(path)

    @pytest.mark.parametrize("text", ["", "\n \n", "[]"])
    def test_say_that_a_file_is_empty(self, tmp_path, text):
        (tmp_path / "data.json").write_text(text)
        with pytest.raises(DataFileError, match="holds no records"):
            read_data(tmp_path / "data.json")

    def test_say_that_there_is_no_file(self, tmp_path):
        with pytest.raises(DataFileError, match=r"nothing\.json: No such file"):
            read_data(tmp_path / "nothing.json")
        with pytest.raises(DataFileError, match="cannot read the data file"):
            read_data(tmp_path)


class TestSplit:
    @pytest.mark.parametrize(("held_out", "sizes"), [(0, (5, 0)), (2, (3, 2)), (5, (0, 5)), (9, (0, 5))])
    def test_keeps_the_last_examples_out(self, tmp_path, held_out, sizes):
        data = read_data(written(tmp_path, *(OWN | {"prompt": str(number)} for number in range(5))))
        early, late = data.split(held_out)
        assert (len(early.examples), len(late.examples)) == sizes
        assert early.examples + late.examples == data.examples
        assert early.digest == late.digest == data.digest
