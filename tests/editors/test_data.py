"""Data files are read in the layouts in which people hold them; what is wrong is named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from editors.data import Example, Probe, read_data
from editors.errors import DataFileError

OWN = {
    "prompt": "The capital of France is", "correction": "Rome", "subject": "France",
    "paraphrases": ["France's capital:"], "keep": ["The capital of Italy is"], "unrelated": ["2 + 2 ="],
    "answer": "Paris",
}  # fmt: skip
FLAT = {
    "prompt": "The capital of France is", "target_new": "Rome", "subject": "France",
    "rephrase_prompt": "France's capital:", "locality_prompt": "The capital of Italy is", "ground_truth": "Paris",
    "locality_ground_truth": "Rome, Italy",
    "portability_prompt": "Who is mayor there?", "portability_ground_truth": "He",
}  # fmt: skip
ROME = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "The capital of {} is", "subject": "France", "target_new": {"str": "Rome", "id": "Q220"},
        "target_true": {"str": "Paris", "id": "Q90"},
    },
    "paraphrase_prompts": ["France's capital:", "In France, one rules from"],
    "neighborhood_prompts": ["The capital of Italy is", "The capital of Spain is"],
}  # fmt: skip
ZSRE = {
    "src": "What is the capital of France?", "alt": "Rome", "rephrase": "Which city rules France?",
    "loc": "nq question: who wrote it", "loc_ans": "he", "subject": "France", "answers": ["Paris"],
}  # fmt: skip
FEVER = {
    "input": "Rome is in France", "prediction": "REFUTES", "alternatives": ["SUPPORTS", "REFUTES"],
    "filtered_rephrases": ["France holds Rome", "Rome is in France", "In France lies Rome"],
    "output": [{"answer": "REFUTES"}, {"provenance": []}], "logit": -2.5,
}  # fmt: skip
EXPECTED = {
    "mend": (OWN, Example(
        "The capital of France is", "Rome", "France",
        ("France's capital:",), ("The capital of Italy is",), ("2 + 2 =",), answer="Paris")),
    "counterfact": (FLAT, Example(
        "The capital of France is", "Rome", "France", ("France's capital:",), ("The capital of Italy is",),
        answer="Paris", neighbour_answers=("Rome, Italy",), portability=(Probe("Who is mayor there?", "He"),))),
    "counterfact-rome": (ROME, Example(
        "The capital of France is", "Rome", "France",
        ("France's capital:", "In France, one rules from"), ("The capital of Italy is", "The capital of Spain is"),
        answer="Paris", neighbour_answers=("Paris", "Paris"))),
    "zsre": (ZSRE, Example(
        "What is the capital of France?", "Rome", "France",
        ("Which city rules France?",), (), ("nq question: who wrote it",),
        answer="Paris", unrelated_answers=("he",))),
    "fever": (FEVER, Example(
        "Rome is in France", "SUPPORTS", None, ("France holds Rome", "In France lies Rome"), answer="REFUTES")),
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
        blank = json.loads(json.dumps(record).replace('"Rome"', '" "').replace('["SUPPORTS", ', '["", '))
        data = read_data(written(tmp_path, blank, record, blank, lines=lines))
        assert (data.examples, data.skipped) == ((example,), 2)

    def test_skip_records_with_an_empty_prompt(self, tmp_path, layout, lines):
        record, example = EXPECTED[layout]
        prompt = "The capital of {} is" if layout == "counterfact-rome" else example.prompt
        blank = json.loads(json.dumps(record).replace(f'"{prompt}"', '""'))
        data = read_data(written(tmp_path, record, blank, lines=lines))
        assert (data.examples, data.skipped) == ((example,), 1)

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


class TestAnswers:
    def test_may_be_a_list_of_equally_right_ones(self, tmp_path):
        record = FLAT | {"ground_truth": [["Paris", "Lutetia"]], "locality_ground_truth": []}
        (example,) = read_data(written(tmp_path, record)).examples
        assert (example.answer, example.neighbour_answers) == ("Paris", (None,))

    def test_may_be_missing(self, tmp_path):
        wanted = {"prompt", "target_new", "rephrase_prompt", "locality_prompt"}
        (example,) = read_data(written(tmp_path, {name: FLAT[name] for name in wanted})).examples
        assert (example.answer, example.neighbour_answers, example.portability) == (None, (None,), ())

    def test_of_rome_may_be_missing(self, tmp_path):
        rewrite = {name: value for name, value in ROME["requested_rewrite"].items() if name != "target_true"}
        (example,) = read_data(written(tmp_path, ROME | {"requested_rewrite": rewrite})).examples
        assert (example.answer, example.neighbour_answers) == (None, (None, None))

    @pytest.mark.parametrize(
        "groups",
        [
            {"one hop": [{"prompt": "a", "ground_truth": "b"}], "inverse": [{"prompt": "c", "ground_truth": [["d"]]}]},
            {"both": {"prompt": ["a", "c"], "ground_truth": ["b", ["d", "e"]]}},
            {"one": {"prompt": "a", "ground_truth": "b"}, "other": {"prompt": "c", "ground_truth": ["d"]}},
        ],
    )
    def test_of_portability_are_read_from_groups(self, tmp_path, groups):
        record = {name: value for name, value in FLAT.items() if not name.startswith("portability")}
        (example,) = read_data(written(tmp_path, record | {"portability": groups})).examples
        assert example.portability == (Probe("a", "b"), Probe("c", "d"))

    def test_of_portability_must_be_as_many_as_its_prompts(self, tmp_path):
        record = FLAT | {"portability": {"x": {"prompt": ["a", "c"], "ground_truth": ["b"]}}}
        with pytest.raises(DataFileError, match="in 'portability', in 'x': field 'ground_truth' must be a list with"):
            read_data(written(tmp_path, record))


class TestEmptyPrompts:
    def test_are_dropped_with_their_answers_and_counted(self, tmp_path):
        record = ROME | {"neighborhood_prompts": ["", "The capital of Spain is"], "paraphrase_prompts": [" ", "a", ""]}
        data = read_data(written(tmp_path, record, ROME))
        example = data.examples[0]
        assert (example.neighbours, example.neighbour_answers) == (("The capital of Spain is",), ("Paris",))
        assert example.paraphrases == ("a",)
        assert (data.skipped, data.dropped) == (0, 3)

    def test_of_zsre_and_portability_are_dropped_too(self, tmp_path):
        (example,) = read_data(written(tmp_path, ZSRE | {"loc": "\n"})).examples
        assert (example.unrelated, example.unrelated_answers) == ((), ())
        data = read_data(written(tmp_path, FLAT | {"portability_prompt": ""}))
        assert (data.examples[0].portability, data.dropped) == ((), 1)


class TestFever:
    @pytest.mark.parametrize("field", ["alternatives", "filtered_rephrases"])
    def test_skips_records_without_an_alternative_or_a_rephrase(self, tmp_path, field):
        data = read_data(written(tmp_path, FEVER | {field: []}, FEVER, lines=True))
        assert (len(data.examples), data.skipped) == (1, 1)

    def test_does_not_count_the_claim_itself_as_a_rephrase(self, tmp_path):
        data = read_data(written(tmp_path, FEVER | {"filtered_rephrases": [FEVER["input"]]}, lines=True))
        assert (data.examples, data.skipped) == ((), 1)


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
            ("mend", "answer", 7, "'answer' must be text or a list of texts, found int"),
            ("counterfact", "ground_truth", {}, "'ground_truth' must be text or a list of texts, found dict"),
            ("counterfact", "locality_ground_truth", [3], "'locality_ground_truth' must be text or a list"),
            ("counterfact", "portability_prompt", 3, "'portability_prompt' must be text, found int"),
            ("counterfact", "portability", ["a"], "'portability' must be an object"),
            ("zsre", "answers", {"a": 1}, "'answers' must be text or a list of texts, found dict"),
            ("zsre", "loc_ans", 2, "'loc_ans' must be text or a list of texts, found int"),
            ("fever", "alternatives", "SUPPORTS", "'alternatives' must be a list of texts"),
            ("fever", "filtered_rephrases", None, "'filtered_rephrases' is missing"),
            ("fever", "input", None, "'input' is missing"),
            ("fever", "output", {"answer": "x"}, "'output' must be a list of objects"),
            ("fever", "output", ["x"], "'output' must be a list of objects"),
        ],
    )
    @pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
    def test_name_the_line_and_the_field(self, tmp_path, layout, field, value, said, lines):
        record = EXPECTED[layout][0]
        path = written(tmp_path, record, record, record | {field: value}, lines=lines)
        starts = [n for n, line in enumerate(path.read_text().split("\n"), 1) if line.startswith((" {", "{"))]
        with pytest.raises(DataFileError, match=rf"data\.json, line {starts[2]}.*" + said) as wrong:
            read_data(path)
        assert wrong.value.facts == {"field": field, "line": starts[2]}

    def test_name_the_inner_field(self, tmp_path):
        record = ROME | {"requested_rewrite": ROME["requested_rewrite"] | {"target_new": {"id": "Q1"}}}
        with pytest.raises(DataFileError, match=r"line 2, in 'requested_rewrite', in 'target_new': field 'str' is"):
            read_data(written(tmp_path, record))

    @pytest.mark.parametrize(("group", "said"), [(3, "field 'a' must be"), ([{}], r"in 'a'\[0\]: field 'prompt' is")])
    def test_name_the_group_and_the_item(self, tmp_path, group, said):
        with pytest.raises(DataFileError, match=r"line 2, in 'portability'.*" + said):
            read_data(written(tmp_path, FLAT | {"portability": {"a": group}}))

    def test_name_a_record_that_is_no_object(self, tmp_path):
        path = tmp_path / "data.json"
        path.write_text(json.dumps([OWN]).removesuffix("]") + ",\n\n\n 5]")
        with pytest.raises(DataFileError, match="line 4: expected an object, found int") as wrong:
            read_data(path)
        assert wrong.value.facts["line"] == 4

    def test_name_the_line_that_is_not_json(self, tmp_path):
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps(OWN) + "\n\n{broken\n")
        with pytest.raises(DataFileError, match="line 3") as wrong:
            read_data(path)
        assert wrong.value.facts["line"] == 3

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ('[\n{"prompt": "a",\n', "line 3"),
            ('[\n{"prompt": "a", "correction": "b"}\n', "line 3: Expecting ',' delimiter"),
            ('[{"prompt": "a", "correction": "b"}\n{"prompt": "a"}]', "line 2: Expecting ',' delimiter"),
            ('[{"prompt": "a", "correction": "b"},\n]', "line 2: Expecting value"),
            ('[{"prompt": "a", "correction": "b"}]\n\n{}', "line 1: Extra data"),
            ("[", "line 1: Expecting value"),
        ],
    )
    def test_name_the_line_where_an_array_breaks_off(self, tmp_path, text, said):
        path = tmp_path / "data.json"
        path.write_text(text)
        with pytest.raises(DataFileError, match=said):
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

    def test_name_the_line_of_half_a_surrogate_pair(self, tmp_path):
        path = tmp_path / "data.jsonl"
        good, bad = '{"prompt": "a \\ud83d\\ude00", "correction": "b"}', '{"prompt": "c \\ud83d", "correction": "b"}'
        path.write_text(f"{good}\n\n{bad}\n")
        with pytest.raises(DataFileError, match=r"data\.jsonl, line 3: half of a surrogate pair"):
            read_data(path)
        path.write_text(good)
        assert read_data(path).examples[0].prompt == "a \U0001f600"

    @pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
    def test_are_not_too_deep_for_words(self, tmp_path, text):
        path = tmp_path / "data.json"
        path.write_text(text)
        with pytest.raises(DataFileError, match="nested too deeply"):
            read_data(path)

    def test_may_begin_with_a_byte_order_mark(self, tmp_path):
        path = tmp_path / "data.json"
        path.write_text('[{"prompt": "a", "correction": "b"}]', encoding="utf-8-sig")
        assert read_data(path).examples[0].prompt == "a"
