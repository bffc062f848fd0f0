"""`mend apply`: a file of wanted corrections against a service that runs."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from service.cli import client
from service.cli.client_command import DRIFT, REFUSED, UNREACHABLE
from tests.cli import running
from tests.cli.running import Ended, Fault, Live, between, run_mend
from tests.service_fixtures import ANSWERS, never_takes

EXAMPLE = Path(__file__).parents[2] / "docker" / "github-actions-apply.yml"

Mend = Callable[..., Ended]
Want = Callable[..., Path]


@pytest.fixture
def mend(service: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mend:
    """`mend apply …` for that service, unless it names another."""
    monkeypatch.delenv("MEND_ACTOR", raising=False)
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setenv("MEND_SERVICE", service.url)
    return lambda *arguments: run_mend(monkeypatch, capsys, "apply", *arguments)


@pytest.fixture
def want(tmp_path: Path) -> Want:
    """Write the file of wanted corrections."""

    def want(*bodies: dict, name: str = "wanted.yaml") -> Path:
        file = tmp_path / name
        lines = "\n".join(json.dumps(body, ensure_ascii=False) for body in bodies)
        file.write_text(lines if file.suffix == ".jsonl" else yaml.safe_dump({"edits": list(bodies)}), encoding="utf-8")
        return file

    return want


def pairs(edits: list[dict]) -> set[tuple[str, str]]:
    return {(edit["prompt"], edit["correction"]) for edit in edits}


def other_answer(live: Live, body: dict, *used: str) -> dict:
    """The same prompt with another answer, which takes now."""
    for answer in ANSWERS:
        if answer != body["correction"].strip() and f" {answer}" not in used:
            other = {**body, "correction": f" {answer}"}
            asked = live.server.client.post("/edits", json=other, params={"dry_run": True})
            if asked.status_code == 200 and asked.json()["status"] == "dry_run":
                return other
    raise AssertionError("no other answer takes")


def refused(prompt: str = never_takes().prompt) -> dict:
    return {"prompt": prompt, "correction": never_takes().correction}


class TestApply:
    def test_makes_what_is_missing_and_then_there_is_nothing_to_do(self, mend, live, want):
        first, second, _ = live.edits
        file = want(
            {**first, "reason": "its own", "metadata": {"ticket": 1}, "keep": ["Norway"], "subject": "a"}, second
        )
        ended = mend(file, "--yes", "--actor", "pipeline", "--reason", "for all")
        assert ended.status == 0, ended
        assert "2 to create, 0 to change, 0 to remove; 0 are so already\n" in ended.out
        assert ended.out.endswith(f"2 created, 0 changed, 0 removed; revision {live.get('/revision')['revision']}\n")
        two, one = live.active()
        assert pairs([one, two]) == pairs([first, second])
        assert (one["actor"], one["reason"], one["subject"]) == ("pipeline", "its own", "a")
        assert (two["actor"], two["reason"]) == ("pipeline", "for all")
        assert one["metadata"] == {"ticket": 1, "applied_by": "mend apply", "applied_set": "default"}
        assert one["batch"]["id"] == two["batch"]["id"]
        for flags in (["--yes"], ["--check"], []):
            again = mend(file, *flags)
            assert (again.status, again.err) == (0, "")
            assert again.out == "0 to create, 0 to change, 0 to remove; 2 are so already\n"

    def test_tells_the_plan_and_with_check_changes_nothing(self, mend, live, want):
        first, second, third = live.edits
        assert mend(want(first, second), "--yes").status == 0
        gone, changed = live.active()
        before = live.get("/revision")
        other = other_answer(live, first)
        ended = mend(want(other, third), "--check")
        assert ended.status == DRIFT
        assert ended.out.splitlines() == [
            f"change  {first['prompt']!r}: {first['correction']!r} -> {other['correction']!r}  ({changed['id']})",
            f"create  {third['prompt']!r}: {third['correction']!r}",
            f"remove  {second['prompt']!r}: {second['correction']!r}  ({gone['id']})",
            "1 to create, 1 to change, 1 to remove; 0 are so already",
        ]
        assert live.get("/revision") == before

    def test_changes_and_removes(self, mend, live, want):
        first, second, third = live.edits
        assert mend(want(first, second), "--yes").status == 0
        other = other_answer(live, first)
        file = want(other, third)
        ended = mend(file, "--yes", "--partial", "--reason", "new plan", "--actor", "ops")
        gone = live.get("/edits", q=second["prompt"])["items"][0]["rolled_back"]
        assert (gone["reason"], gone["actor"]) == ("new plan", "ops")
        assert f"{second['prompt']}" not in {edit["prompt"] for edit in live.active()}
        # Whether both others take together is up to the random model.
        assert pairs(live.active()) <= pairs([other, third, first])
        assert ended.status in (0, REFUSED), ended
        assert mend(file, "--check", "--partial").status == ended.status

    def test_takes_the_file_for_right_and_leaves_alone_what_it_has_not(self, mend, live, want):
        first, second, _ = live.edits
        theirs, unnamed = live.post(first), live.post(second)
        other = other_answer(live, first)
        assert mend(want(other), "--yes").status == 0
        newer, still = live.active()
        assert (newer["supersedes"], still["id"]) == ([theirs["id"]], unnamed["id"])
        ended = mend(want(), "--yes")
        assert "0 created, 0 changed, 1 removed; " in ended.out
        assert {edit["id"] for edit in live.active()} == {theirs["id"], unnamed["id"]}
        # And a file that says the same does not make them its own.
        assert mend(want(first, second), "--yes").out.startswith("0 to create, 0 to change, 0 to remove; 2 are so")
        assert mend(want(), "--check").status == 0

    def test_takes_back_what_comes_back_of_its_own(self, mend, live, want):
        first = live.edits[0]
        assert mend(want(first), "--yes").status == 0
        assert mend(want(other_answer(live, first)), "--yes").status == 0
        ended = mend(want(), "--yes")
        assert ended.out.splitlines()[-2:] == [
            "0 to create, 0 to change, 1 to remove; 0 are so already",
            f"0 created, 0 changed, 2 removed; revision {live.get('/revision')['revision']}",
        ]
        assert live.active() == []

    def test_removes_only_of_its_own_set_and_nothing_without_prune(self, mend, live, want):
        first, second, _ = live.edits
        assert mend(want(first), "--yes").status == 0
        assert mend(want(second, name="other.yml"), "--yes", "--set", "other").status == 0
        assert pairs(live.active()) == pairs([first, second])
        assert mend(want(), "--check", "--no-prune").status == 0
        assert mend(want(), "--check").status == DRIFT
        assert mend(want(), "--yes").status == 0
        assert pairs(live.active()) == pairs([second])

    def test_of_what_the_model_says_anyway_makes_nothing_and_is_no_drift(self, mend, live, want):
        prompt = live.edits[0]["prompt"]
        says = live.get("/generate", prompt=prompt, max_new_tokens=1)["text"]
        file = want({"prompt": prompt, "correction": says})
        for flags in (["--check"], ["--yes"]):
            ended = mend(file, *flags)
            assert ended.status == 0, ended
            assert ended.out == "0 to create, 0 to change, 0 to remove; 1 are so already\n"
        assert live.active() == []

    def test_makes_what_was_true_only_because_of_what_it_removes(self, mend, live, want):
        """A prompt that is worded anew is still answered rightly, as long as the old edit is there."""
        first = live.edits[0]
        # To the small model's tokenizer both characters are unknown, and so the same; to us they are not.
        old, new = ({**first, "prompt": f"山{first['prompt']}"}, {**first, "prompt": f"田{first['prompt']}"})
        assert mend(want(old), "--yes").status == 0
        made = live.active()
        assert pairs(made) == pairs([old])
        ended = mend(want(new), "--yes")
        assert ended.status == 0, ended
        assert "0 to create, 0 to change, 1 to remove; 1 are so already\n1 created, 0 changed, 1 removed; " in ended.out
        assert pairs(live.active()) == pairs([new])

    def test_does_not_let_one_entry_take_the_place_of_another(self, mend, live, want):
        first = live.edits[0]
        old = {**first, "prompt": f"山{first['prompt']}"}
        assert mend(want(old), "--yes").status == 0
        before = live.get("/revision")
        other = other_answer(live, {**first, "prompt": f"田{first['prompt']}"})
        said = mend(want(old, other), "--yes").refusal
        assert said.startswith(f"entry 2 would take the place of entry 1, {old['prompt']!r}: ")
        assert live.get("/revision") == before

    def test_says_whose_place_is_taken_too(self, mend, live, want):
        first = live.edits[0]
        theirs = live.post({**first, "prompt": f"山{first['prompt']}"})
        other = other_answer(live, {**first, "prompt": f"田{first['prompt']}"})
        ended = mend(want(other), "--check")
        assert ended.status == DRIFT
        assert ended.out.splitlines()[0].endswith(f"; takes the place of {theirs['id']} too")

    def test_another_subject_is_another_edit(self, mend, live, want):
        """Though the service makes none while the model says the correction."""
        first = live.edits[0]
        assert mend(want(first), "--yes").status == 0
        with between(live.url, "/edits/batch") as proxy:
            assert mend(want({**first, "subject": "a"}), "--check", "--service", proxy.url).status == 0
        assert len(proxy.keys) == 1


class TestRefused:
    def test_names_each_edit_and_changes_nothing(self, mend, live, want):
        first, second, _ = live.edits
        assert mend(want(first), "--yes").status == 0
        before = live.get("/revision")
        ended = mend(want(second, refused("Germany speaks"), refused("Oslo\u2028is")), "--yes")
        assert (ended.status, ended.out) == (REFUSED, "")
        trying, *named, last = ended.err.splitlines()
        assert trying == "mend: trying 3 edits …"
        assert named[0].startswith("mend: entry 2, 'Germany speaks': refused: ")
        assert named[0].endswith("(did_not_take)")
        assert ended.err.count("mend: entry 3, ") == 1
        assert last.endswith("(batch_refused)")
        assert live.get("/revision") == before

    def test_is_the_problem_itself_as_json(self, mend, live, want):
        ended = mend(want(refused()), "--check", "--json")
        batch = {"edits": [refused()]}
        problem = live.server.client.post("/edits/batch", json=batch, params={"dry_run": True}).json()
        assert ended.status == REFUSED
        told = json.loads(ended.out)
        assert (told["code"], told["detail"]) == ("batch_refused", problem["detail"])
        for one, other in zip(told["edits"], problem["edits"], strict=True):
            assert one.items() <= other.items()
            assert (one["code"], one["status"]) == ("did_not_take", "refused")

    def test_leaves_the_others_with_partial(self, mend, live, want):
        first, second, _ = live.edits
        assert mend(want(first), "--yes").status == 0
        file = want(second, refused("Germany speaks"))
        ended = mend(file, "--yes", "--partial")
        assert ended.status == REFUSED
        assert f"refuse  'Germany speaks': {never_takes().correction!r}\n" in ended.out
        assert "1 created, 0 changed, 1 removed; " in ended.out
        assert pairs(live.active()) == pairs([second])
        again = mend(file, "--check", "--partial")
        assert (again.status, again.out.splitlines()[-1]) == (
            REFUSED,
            "0 to create, 0 to change, 0 to remove; 1 are so already",
        )

    def test_with_partial_and_nothing_else_still_removes(self, mend, live, want):
        assert mend(want(live.edits[0]), "--yes").status == 0
        ended = mend(want(refused("Germany speaks")), "--yes", "--partial")
        assert ended.status == REFUSED
        assert "0 created, 0 changed, 1 removed; " in ended.out
        assert live.active() == []


class TestConsent:
    def test_cannot_be_asked_for_without_a_terminal(self, mend, live, want):
        before = live.get("/revision")
        ended = mend(want(live.edits[0]))
        assert (ended.status, ended.out.count("\n")) == (REFUSED, 2)
        assert "there is no terminal to ask on; --yes" in ended.refusal
        assert live.get("/revision") == before

    @pytest.mark.parametrize(("says", "status", "made"), [("y", 0, 1), ("n", REFUSED, 0), ("", REFUSED, 0)])
    def test_is_asked_for_on_a_terminal(self, live, want, says, status, made):
        here, there = pty.openpty()
        with os.fdopen(here, "wb", buffering=0) as terminal:
            asking = subprocess.Popen(
                [sys.executable, "-c", "from service.cli import main; main()", "apply", str(want(live.edits[0]))],
                env={**os.environ, "MEND_SERVICE": live.url, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=there,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            os.close(there)
            terminal.write(f"{says}\n".encode())
            out, err = asking.communicate(timeout=60)
        assert asking.returncode == status, err
        assert f"Apply this to {live.url}? [y/N]:" in err
        assert "Apply this" not in out
        assert ("mend: nothing was changed" in err) == (not made)
        assert len(live.active()) == made


class TestOthersMeanwhile:
    def test_keep_it_from_being_applied(self, mend, live, want):
        first, _, third = live.edits
        theirs = Fault(before=lambda: live.post(third))
        with between(live.url, "/edits/batch", Fault(), theirs) as proxy:
            ended = mend(want(first), "--yes", "--service", proxy.url)
        assert ended.status == REFUSED
        assert ended.refusal.endswith("(revision_mismatch)")
        assert pairs(live.active()) == pairs([third])

    def test_keep_it_from_rolling_back(self, mend, live, want):
        first, _, third = live.edits
        assert mend(want(first), "--yes").status == 0
        with between(live.url, "/edits/edit_", Fault(before=lambda: live.post(third))) as proxy:
            assert mend(want(), "--yes", "--service", proxy.url).refusal.endswith("(revision_mismatch)")
        assert pairs(live.active()) == pairs([first, third])

    def test_are_noticed_between_two_pages(self, mend, live, want, monkeypatch):
        first, second, third = live.edits
        live.post(first), live.post(second)
        monkeypatch.setattr(client, "PAGE", 1)
        with between(live.url, "/edits?", Fault(), Fault(before=lambda: live.post(third))) as proxy:
            assert "changed while they were read" in mend(want(), "--check", "--service", proxy.url).refusal


class TestAnAnswerThatIsLost:
    @pytest.mark.parametrize("fault", [running.LOST, Fault(passed_on=0.5)], ids=["whole", "half"])
    def test_makes_no_second_batch(self, mend, live, want, fault):
        first, second, _ = live.edits
        revision = live.get("/revision")["revision"]
        with between(live.url, "/edits/batch", Fault(), fault) as proxy:
            ended = mend(want(first, second), "--yes", "--service", proxy.url)
        assert ended.status == 0, ended
        assert live.get("/revision")["revision"] == revision + 2
        foretold, made, again = proxy.keys
        assert foretold is None
        assert made == again is not None

    def test_makes_no_second_rollback(self, mend, live, want):
        first, second, _ = live.edits
        assert mend(want(first, second), "--yes").status == 0
        with between(live.url, "/edits/edit_", running.LOST) as proxy:
            ended = mend(want(), "--yes", "--service", proxy.url)
        assert ended.status == 0, ended
        assert live.active() == []

    def test_of_a_dry_run_leaves_nothing_unknown(self, mend, live, want):
        with between(live.url, "/edits/batch", running.LOST) as proxy:
            ended = mend(want(live.edits[0]), "--check", "--service", proxy.url, "--wait", 0)
        assert ended.status == UNREACHABLE
        assert "not known" not in ended.err

    def test_for_good_ends_with_4(self, mend, live, want):
        with between(live.url, "/", running.LOST) as proxy:
            assert mend(want(), "--check", "--service", proxy.url, "--wait", 0).status == UNREACHABLE

    def test_of_lines_that_end_too_early_is_one_too(self, mend, live, want):
        whole_lines = Fault(
            says=(200, {"Content-Type": "application/x-ndjson"}, b'{"progress": {"step": "x", "done": 1, "of": 2}}\n')
        )
        with between(live.url, "/edits/batch", whole_lines) as proxy:
            ended = mend(want(live.edits[0]), "--check", "--service", proxy.url)
        assert ended.status == DRIFT
        assert "mend: the answer of 127.0.0.1 broke off; asking again" in ended.err


class TestOutput:
    def test_as_json_is_the_plan_and_the_services_own_answers(self, mend, live, want):
        first, second, _ = live.edits
        assert mend(want(first), "--yes").status == 0
        (old,) = live.active()
        ended = mend(want(second), "--yes", "--json")
        told = json.loads(ended.out)
        (new,) = live.active()
        assert told["plan"] == [
            {"action": "create", "entry": "entry 1", **second, "id": None, "before": None, "supersedes": []},
            {"action": "remove", "entry": None, "prompt": first["prompt"], "correction": None, "id": old["id"],
             "before": first["correction"], "supersedes": []},
        ]  # fmt: skip
        assert told["revision"] == told["batch"]["revision"] == live.get("/revision")["revision"]
        assert told["batch"]["digest"] == live.get("/revision")["digest"]
        assert [edit["id"] for edit in told["batch"]["edits"]] == [new["id"]]
        assert [back["edit"] for back in told["rolled_back"]] == [live.get(f"/edits/{old['id']}")]
        assert "1 created, 0 changed, 1 removed; " in ended.err

    def test_as_json_of_a_check_is_the_plan_alone(self, mend, live, want):
        revision = live.get("/revision")["revision"]
        ended = mend(want(live.edits[0]), "--check", "--json")
        told = json.loads(ended.out)
        assert ended.status == DRIFT
        assert (told["revision"], told["rolled_back"], told["batch"]) == (revision, [], None)
        assert [step["action"] for step in told["plan"]] == ["create"]

    def test_tells_of_progress_on_stderr(self, mend, live, want, monkeypatch):
        monkeypatch.setattr(client, "TELLS_EVERY_S", 0)
        ended = mend(want(live.edits[0]), "--check")
        assert "mend: answer 1/1 …\n" in ended.err
        assert "…" not in ended.out

    def test_of_texts_in_any_script(self, mend, live, want):
        body = {**live.edits[0], "prompt": f"山\u2028\x85{live.edits[0]['prompt']}", "reason": "für «山»\n"}
        for name in ("wanted.jsonl", "wanted.yaml"):
            ended = mend(want(body, name=name), "--yes")
            assert ended.status == 0, ended
            (made,) = live.active()
            assert (made["prompt"], made["reason"]) == (body["prompt"], body["reason"])
            live.clear()


class TestFile:
    @pytest.mark.parametrize("before", ["", "edits:\n", "# ours\n---\n"])
    @pytest.mark.parametrize("name", ["wanted.yaml", "wanted.yml"])
    def test_is_a_list_or_edits_with_one(self, mend, live, tmp_path, before, name):
        prompt, correction = live.edits[0].values()
        (tmp_path / name).write_text(f"{before}- prompt: {prompt}\n  correction: ' {correction.strip()}'\n")
        assert mend(tmp_path / name, "--check").out.startswith(f"create  {prompt!r}: {correction!r}\n")

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"", "is empty; a file that wants no corrections is YAML and says `edits: []`"),
            (b" \n\n", "is empty; "),
            (b"# nothing\n", "should be a list of corrections, or have nothing but `edits:`"),
            (b"edits:\n", "should be a list of corrections, or have nothing but `edits:`"),
            (b"edits: []\nmore: 1\n", "should be a list of corrections, or have nothing but `edits:`"),
            (b"- prompt: [\n- x", "line 2 is not YAML: "),
            (b"- prompt: 2020-13-45", "is not YAML: month must be in 1..12"),
            (b"\xff\xfe\x00", "is not YAML: "),
            (b"[" * 10_000, "is not YAML: "),
            (b"- just text", "entry 1: it should have at least a prompt and a correction, and is 'just text'"),
            (b"- {prompt: a, correction: b}\n- {prompt: a b}", "entry 2: it has no correction"),
            (b"- {prompt: a, correction: 1969}", "entry 1: correction should be text, and is 1969; put it in quotes"),
            (b"- {prompt: a, correction: no}", "entry 1: correction should be text, and is False; put it in quotes"),
            (b"- {prompt: a, correction: '  '}", "entry 1: correction: must not be empty or only white space"),
            (b'- {prompt: "\\ud800", correction: b}', "entry 1: prompt: 'utf-8' codec can't encode"),
            (b"- {prompt: a, correction: b, keep: [c, 1]}", "entry 1: keep.1 should be text, and is 1; put it"),
            (b"- {prompt: a, correction: b, keep: c}", "entry 1: keep: Input should be a valid list"),
            (b"- {prompt: a, correction: b, metadata: {at: 2020-01-01}}", "entry 1: metadata.at: input was not a"),
            (b"- {prompt: a, correction: b, metadata: {applied_by: me}}", "entry 1: metadata: applied_by and"),
            (b"- {prompt: a, correction: b, keeps: []}", "entry 1: keeps is not a known field; the known"),
            ("- {prompt: ü, correction: b}\n- {prompt: ü, correction: c}".encode(), "entry 2: entry 1 has the same"),
        ],
    )  # fmt: skip
    def test_that_makes_no_sense_is_refused(self, mend, tmp_path, content, says):
        (tmp_path / "wanted.yaml").write_bytes(content)
        ended = mend(tmp_path / "wanted.yaml", "--yes")
        assert ended.status == REFUSED
        assert ended.refusal.startswith(str(tmp_path / "wanted.yaml"))
        assert says in ended.refusal

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"\n", "is empty; "),
            (b'{"prompt": "a", "correction": "b"}\n\n{"prompt": "c"}\n', "line 3: it has no correction"),
            (b'{"prompt": "a", "correction": "b"}\n{', "line 2 is not JSON: "),
            (b'{"prompt": "\xff", "correction": "b"}', "line 1 is not JSON: "),
            (b"[" * 100_000, "line 1 is not JSON: "),
            (b"[]", "line 1: it should have at least a prompt and a correction, and is []"),
            (b'{"prompt": "a", "correction": "b", "scale": 2}', "line 1: scale is not a known field"),
        ],
    )
    def test_of_lines_that_makes_no_sense_is_refused(self, mend, tmp_path, content, says):
        (tmp_path / "wanted.jsonl").write_bytes(content)
        ended = mend(tmp_path / "wanted.jsonl", "--yes")
        assert ended.status == REFUSED
        assert says in ended.refusal

    @pytest.mark.parametrize(("name", "says"), [("wanted.txt", "should be YAML (.yaml, .yml) or JSON Lines (.jsonl)"),
                                                ("no.yaml", "no.yaml cannot be read: No such file")])  # fmt: skip
    def test_that_cannot_be_read_is_refused(self, mend, tmp_path, name, says):
        assert says in mend(tmp_path / name, "--check").refusal

    def test_with_too_much_of_something_is_refused_by_the_service(self, mend, live, want):
        ended = mend(want({**live.edits[0], "keep": ["x"] * 33}), "--check")
        assert ended.status == REFUSED
        assert ended.refusal.startswith("line.1.keep: ")


class TestTheExampleForGitHubActions:
    @pytest.fixture
    def step(self, live: Live, tmp_path: Path) -> Callable[[str], Ended]:
        """Run a step of it by name, beside a file of corrections, as a runner does."""
        steps = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))["jobs"]["apply"]["steps"]
        scripts = {step["name"]: step["run"] for step in steps if "run" in step}
        mend = tmp_path / "mend"
        mend.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from service.cli import main; main()' \"$@\"\n")
        mend.chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "MEND_SERVICE": live.url,
            "MEND_ACTOR": "somebody",
            "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
            "GITHUB_REPOSITORY": "us/corrections",
            "GITHUB_SHA": "0123abc",
        }

        def run(name: str) -> Ended:
            shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", scripts[name]]
            ended = subprocess.run(
                shell, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
            )
            return Ended(ended.returncode, ended.stdout, ended.stderr)

        return run

    def test_shows_what_would_be_done_and_does_it(self, live, want, step, tmp_path):
        want(live.edits[0], name="corrections.yaml")
        assert step("Check").status == 0
        assert "1 to create" in (tmp_path / "summary").read_text()
        assert live.active() == []
        assert step("Apply").status == 0
        (made,) = live.active()
        assert (made["actor"], made["reason"]) == ("somebody", "us/corrections@0123abc")
        assert step("Check").status == 0

    def test_fails_a_pull_request_that_would_be_refused(self, want, step, tmp_path):
        want(refused(), name="corrections.yaml")
        assert step("Check").status == REFUSED
        assert "(did_not_take)" in (tmp_path / "summary").read_text()
