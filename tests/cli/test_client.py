"""`mend edit`, `edits`, `rollback`, `generate` and `audit` against a service that runs, and where none answers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from itertools import product

import pytest

from service.cli import client
from service.cli.client_command import DRIFT, EXIT_STATUSES, LOST, REFUSED, UNREACHABLE
from tests.cli import running
from tests.cli.running import Ended, Fault, Live, between
from tests.cli.test_export import answering
from tests.service_fixtures import ANSWERS, PROMPTS, never_takes


def never(live: Live) -> tuple[str, str]:
    """An edit that is refused."""
    return never_takes().prompt, never_takes().correction


class TestEdit:
    def test_is_made_with_all_that_is_said_of_it(self, mend, live):
        body = live.edits[0]
        ended = mend(
            "edit", body["prompt"], body["correction"], "--subject", "a", "--reason", "because", "--actor", "Zoë",
            "--metadata", '{"ticket": "Ü-1"}', "--keep", "Norway", "--paraphrase", "A", "--paraphrase", "B",
        )  # fmt: skip
        (made,) = live.active()
        assert (ended.status, ended.err) == (0, ""), ended
        assert (made["prompt"], made["correction"]) == (body["prompt"], body["correction"])
        assert (made["subject"], made["reason"], made["actor"]) == ("a", "because", "Zoë")
        assert made["metadata"] == {"ticket": "Ü-1"}
        assert [each["prompt"] for each in made["checks"]["paraphrases"]] == ["A", "B"]
        assert [each["prompt"] for each in made["checks"]["keep"]] == ["Norway"]

    def test_is_told_in_two_lines(self, mend, live):
        body = live.edits[0]
        probes = [prompt for prompt in PROMPTS.values() if prompt != body["prompt"]]
        given = [flag for prompt in probes for flag in ("--paraphrase", prompt, "--keep", prompt)]
        ended = mend("edit", body["prompt"], body["correction"], *given)
        (made,) = live.active()
        missed = [repr(each["prompt"]) for each in made["checks"]["paraphrases"] if not each["took"]]
        moved = [repr(each["prompt"]) for each in made["checks"]["keep"] if not each["kept"]]
        assert missed
        assert moved
        assert ended.out == (
            f"{made['id']}  revision {made['revision']}; did not take: {', '.join(missed)}; did not stay: "
            f"{', '.join(moved)}\n  {made['before']['text']!r} -> {made['after']['text']!r}\n"
        )

    def test_supersedes_an_older_one_and_says_which(self, mend, live):
        older = live.post(live.edits[0])
        for answer in ANSWERS:
            ended = mend("edit", older["prompt"], f" {answer}")
            if ended.status == 0 and not ended.out.startswith("unchanged"):
                break
        assert f"; supersedes {older['id']}\n" in ended.out

    def test_as_json_is_the_services_own_answer(self, mend, live):
        body = live.edits[0]
        ended = mend("edit", body["prompt"], body["correction"], "--json")
        answer = json.loads(ended.out)
        assert answer == live.get(f"/edits/{answer['id']}")

    def test_that_is_true_already_makes_none(self, mend, live):
        made = live.post(live.edits[0])
        ended = mend("edit", made["prompt"], made["correction"])
        assert ended.status == 0
        assert ended.out.startswith(f"unchanged  revision {made['revision']}: the model already answers")
        assert [edit["id"] for edit in live.active()] == [made["id"]]

    def test_dry_run_makes_none(self, mend, live):
        body = live.edits[0]
        before = live.get("/revision")
        ended = mend("edit", body["prompt"], body["correction"], "--dry-run")
        assert (ended.status, ended.out.partition(" ")[0]) == (0, "dry")
        assert live.get("/revision") == before

    def test_of_a_chat_teaches_the_reply(self, mend, live):
        for question, answer in product(PROMPTS.values(), ANSWERS):
            ended = mend("edit", question, f" {answer}", "--chat", "--check-form", "text", "--json")
            if ended.status == 0 and (made := json.loads(ended.out))["status"] == "applied":
                break
        assert made["messages"] == [{"role": "user", "content": question}]
        assert [each["form"] for each in made["checks"]["forms"]] == ["text"]
        assert f"{question!r} -> {made['correction']!r}" in mend("edits").out

    def test_that_is_refused_is_said_in_a_line(self, mend, live):
        ended = mend("edit", *never(live))
        assert (ended.status, ended.out) == (REFUSED, "")
        (line,) = ended.err.splitlines()
        assert line.startswith("mend: refused: ")
        assert line.endswith(" (did_not_take)")

    def test_that_is_refused_is_the_problem_itself_as_json(self, mend, live):
        prompt, correction = never(live)
        ended = mend("edit", prompt, correction, "--json")
        body = {"prompt": prompt, "correction": correction}
        assert ended.status == REFUSED
        said, again = json.loads(ended.out), live.server.client.post("/edits", json=body).json()
        assert said.pop("request_id") != again.pop("request_id")
        assert said == again
        assert ended.err.endswith(" (did_not_take)\n")

    def test_only_at_a_revision(self, mend, live):
        body, revision = live.edits[0], live.get("/revision")["revision"]
        given = ("edit", body["prompt"], body["correction"], "--if-match")
        assert mend(*given, revision + 1).refusal.endswith("(revision_mismatch)")
        assert mend(*given, revision).status == 0

    def test_with_a_key_is_made_once(self, mend, live):
        (first, other), key = live.edits[:2], f"key of revision {live.get('/revision')['revision']}"
        again = [mend("edit", *first.values(), "--idempotency-key", key, "--json") for _ in range(2)]
        assert json.loads(again[0].out) == json.loads(again[1].out)
        assert len(live.active()) == 1
        said = mend("edit", *other.values(), "--idempotency-key", key).refusal
        assert said.endswith("(idempotency_key_reused)")

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            (["", " x"], "(invalid_request)"),
            (["a", "b\udcff"], "lone surrogate (U+DCFF)"),
            (["a", "b", "--metadata", "{"], "--metadata is not JSON"),
            (["a", "b", "--metadata", "[" * 100_000], "--metadata is not JSON"),
            (["a", "b", "--metadata", "[]"], "(invalid_request)"),
            (["a", "b", "--on-conflict", "sometimes"], "query.on_conflict: "),
            (["a", "b", "--actor", "山"], "'山' cannot be sent in an HTTP header"),
            (["a", "b", "--actor", "two\nlines"], "this cannot be sent: "),
            (["a", "b", "--actor", "x" * 201], "(invalid_request)"),
            (["a", "b", "--idempotency-key", ""], "(invalid_request)"),
        ],
    )
    def test_that_makes_no_sense_is_refused(self, mend, live, given, says):
        before = live.get("/revision")
        ended = mend("edit", *given)
        assert ended.status == REFUSED
        assert says in ended.refusal
        assert live.get("/revision") == before

    def test_takes_the_actor_from_the_environment(self, mend, live, monkeypatch):
        monkeypatch.setenv("MEND_ACTOR", "pipeline")
        mend("edit", *live.edits[0].values())
        assert live.active()[0]["actor"] == "pipeline"


class TestEdits:
    @pytest.fixture
    def made(self, live: Live) -> list[dict]:
        """Newest first; the last of them is rolled back."""
        made = [live.post(body) for body in live.edits[:2]][::-1]
        live.server.client.delete(f"/edits/{made[-1]['id']}", params={"reason": "no\nmore"}, headers={"X-Actor": "me"})
        return made

    def test_are_a_line_each_newest_first(self, mend, made):
        ended = mend("edits", "--limit", 2)
        for line, edit, status in zip(ended.out.splitlines(), made, ("applied", "rolled_back"), strict=True):
            assert line.startswith(f"{edit['id']}  {status}")
            assert line.endswith(f"  {edit['prompt']!r} -> {edit['correction']!r}")
        assert "there are more than 2; --limit or --all" in ended.err

    def test_are_filtered(self, mend, made):
        assert mend("edits", "--status", "applied").out.startswith(f"{made[0]['id']}  ")
        assert mend("edits", "--q", "nobody asks this") == Ended(0, "", "mend: no edits\n")
        assert mend("edits", "--status", "lost").refusal.endswith("(invalid_request)")
        at = made[0]["created_at"]
        assert mend("edits", "--since", at, "--limit", 1).out.startswith(f"{made[0]['id']}  ")
        assert mend("edits", "--since", at, "--until", at[:10], "--actor", "nobody") == Ended(0, "", "mend: no edits\n")
        assert "2030-01-31" in mend("edits", "--until", "yesterday").refusal

    @pytest.mark.parametrize("given", [["--limit", "1"], ["--limit", "3"], ["--q", "the", "--limit", "2"], []])
    def test_as_json_are_the_services_own_answer(self, mend, live, made, given):
        query = dict(zip([name.removeprefix("--") for name in given[::2]], given[1::2], strict=True))
        assert json.loads(mend("edits", *given, "--json").out) == live.get("/edits", **query)

    @pytest.mark.parametrize(("limit", "given"), [(3, ["--limit", "3"]), (500, ["--all"])])
    def test_of_several_pages_are_as_of_one(self, mend, live, made, monkeypatch, limit, given):
        monkeypatch.setattr(client, "PAGE", 2)
        told = json.loads(mend("edits", *given, "--json").out)
        assert told == live.get("/edits", limit=limit)
        assert len(told["items"]) >= 2

    def test_one_is_told_whole(self, mend, live, made):
        ended = mend("edits", made[1]["id"])
        assert ended.out.startswith(f"{made[1]['id']}  rolled_back")
        assert ended.out.endswith(" by me: 'no\\nmore'\n")
        shown = mend("edits", made[1]["id"], "--json")
        assert json.loads(shown.out) == live.get(f"/edits/{made[1]['id']}")

    @pytest.mark.parametrize("edit_id", ["edit_1", "a/b?c#d", "ü ", "\x01"])
    def test_one_that_there_is_not_is_refused(self, mend, edit_id):
        ended = mend("edits", edit_id)
        assert ended.status == REFUSED
        assert ended.refusal.endswith("found)")

    def test_one_needs_no_filter(self, mend):
        for given in (("--status", "applied"), ("--q", "a"), ("--actor", "me"), ("--since", "2026-01-01")):
            assert "leave out --status, --q, --actor" in mend("edits", "edit_1", *given).refusal


class TestGenerate:
    def test_prints_the_text_alone(self, mend, live):
        made = live.post(live.edits[0])
        ended = mend("generate", made["prompt"], "--max-new-tokens", 3)
        said = live.get("/generate", prompt=made["prompt"], max_new_tokens=3)["text"]
        assert ended == Ended(0, f"{said}\n", "")
        assert said.strip().startswith(made["correction"].strip())

    def test_labels_both_views(self, mend, live):
        made = live.post(live.edits[0])
        said = live.get("/generate", prompt=made["prompt"], view="both")
        ended = mend("generate", made["prompt"], "--view", "both")
        assert ended.out == f"live: {said['live']['text']}\nbase: {said['base']['text']}\n"

    @pytest.mark.parametrize(
        ("given", "asked"),
        [
            (["--stop", "q", "--stop", "zz", "--max-new-tokens", "40"], {"stop": ["q", "zz"], "max_new_tokens": 40}),
            (["--temperature", "2", "--top-k", "9", "--repetition-penalty", "1.5", "--seed", "4"],
             {"temperature": 2, "top_k": 9, "repetition_penalty": 1.5, "seed": 4}),
        ],
    )  # fmt: skip
    def test_asks_as_it_is_told_also_in_a_stream(self, mend, live, given, asked):
        prompt = live.edits[0]["prompt"]
        said = live.server.client.post("/generate", json={"prompt": prompt, **asked}).json()
        for stream in ([], ["--stream"]):
            assert mend("generate", prompt, *given, *stream) == Ended(0, f"{said['text']}\n", "")
        whole = json.loads(mend("generate", prompt, *given, "--json").out)
        lines = [json.loads(line) for line in mend("generate", prompt, *given, "--json", "--stream").out.splitlines()]
        assert lines[-1] == {"event": "done", **whole} == {"event": "done", **said}
        assert "".join(line["text"] for line in lines[:-1]) == said["text"]

    def test_of_a_chat_is_the_reply(self, mend, live):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which city?"}]
        said = live.server.client.post("/generate", json={"messages": messages}).json()
        ended = mend("generate", "Which city?", "--chat", "--system", "Be brief.")
        assert ended == Ended(0, f"{said['text']}\n", "")
        assert mend("generate", "x", "--system", "y").refusal == "--system is for a chat; add --chat"

    def test_of_both_views_is_no_stream_of_text(self, mend):
        assert "no order of its own" in mend("generate", "x", "--stream", "--view", "both").refusal

    def test_that_makes_no_sense_is_refused_as_a_stream_too(self, mend):
        ended = mend("generate", "x", "--stream", "--max-new-tokens", "100000")
        assert (ended.status, ended.out) == (REFUSED, "")
        assert ended.err.endswith(" (text_too_long)\n")

    @pytest.mark.parametrize("view", ["live", "base", "both"])
    def test_as_json_is_the_services_own_answer(self, mend, live, view):
        asked = {"temperature": 1.5, "top_p": 0.9, "seed": 7, "view": view, "max_new_tokens": 9, "min_revision": 0}
        flags = [flag for name, value in asked.items() for flag in (f"--{name.replace('_', '-')}", value)]
        told = json.loads(mend("generate", "Größe 山", *flags, "--json").out)
        assert told == live.server.client.post("/generate", json={"prompt": "Größe 山", **asked}).json()

    @pytest.mark.parametrize(
        ("given", "code"),
        [(["--view", "all"], "invalid_request"), (["--temperature", "-1"], "invalid_request"),
         (["--min-revision", "1000000"], "revision_not_reached")],
    )  # fmt: skip
    def test_that_makes_no_sense_is_refused(self, mend, given, code):
        ended = mend("generate", "The", *given)
        assert ended.status == REFUSED
        assert ended.refusal.endswith(f"({code})")


class TestAudit:
    def test_of_edits_that_hold_ends_well(self, mend, live):
        live.post(live.edits[0])
        ended = mend("audit", "--fresh")
        digest = live.get("/revision")["digest"]
        assert (ended.status, ended.err) == (0, "")
        assert ended.out == f"1 of 1 active edits hold at revision {live.get('/revision')['revision']}, {digest}\n"

    def test_lists_what_is_lost_and_to_what(self, mend, live):
        lose_one(live)
        ended = mend("audit", "--fresh")
        audit = live.get("/edits/audit")
        lost = [edit for edit in audit["edits"] if not edit["holds"]]
        assert ended.status == LOST
        first, *others = ended.out.splitlines()
        assert first.startswith(f"{audit['held']} of {audit['held'] + audit['lost']} active edits hold at revision ")
        assert [line.partition(" ")[0] for line in others] == [edit["id"] for edit in lost]
        assert all(line.endswith(f"lost to {edit['lost_to']}") for line, edit in zip(others, lost, strict=True))
        told = mend("audit", "--json")
        assert (told.status, json.loads(told.out)) == (LOST, audit)

    def test_that_is_old_says_so(self, mend, live):
        live.get("/edits/audit", fresh=True)
        live.post(live.edits[0])
        assert "--fresh looks at what is" in mend("audit").err


def lose_one(live: Live) -> None:
    """Make edits until one of them no longer holds."""
    for prompt, answer in product(PROMPTS.values(), ANSWERS):
        live.server.client.post(
            "/edits", json={"prompt": prompt, "correction": f" {answer}"}, params={"allow_loss": True}
        )
        if live.get("/edits/audit", fresh=True)["lost"]:
            return
    raise AssertionError("all edits hold")


def refusing(status: int, retry_after: str | None, code: str = "not_ready") -> Fault:
    problem = {"status": status, "code": code, "detail": "in a moment", "title": "", "type": ""}
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return Fault(says=(status, headers, json.dumps(problem).encode()))


class TestAnAnswerThatIsLost:
    @pytest.mark.parametrize("fault", [running.LOST, Fault(passed_on=0.5)], ids=["whole", "half"])
    def test_makes_no_second_edit(self, mend, live, fault):
        revision = live.get("/revision")["revision"]
        with between(live.url, "/edits", fault, fault) as proxy:
            ended = mend("edit", *live.edits[0].values(), "--service", proxy.url, "--json")
        assert ended.status == 0, ended
        assert live.get("/revision")["revision"] == revision + 1
        assert json.loads(ended.out) == live.active()[0]
        assert (len(proxy.keys), len(set(proxy.keys))) == (3, 1)
        assert [line.rpartition("; ")[2] for line in ended.err.splitlines()] == [
            "asking again in 0.1 s …",
            "asking again in 0.2 s …",
        ]

    def test_makes_no_second_rollback(self, mend, live):
        ids = [live.post(body)["id"] for body in live.edits[:2]]
        with between(live.url, "/edits", running.LOST) as proxy:
            ended = mend("rollback", *ids, "--service", proxy.url, "--json")
        assert ended.status == 0, ended
        assert [json.loads(line)["id"] for line in ended.out.splitlines()] == ids
        first, again, second = proxy.keys
        assert first == again
        assert None not in (first, second)
        assert first != second

    def test_is_asked_for_again_where_nothing_changes_too(self, mend, live):
        with between(live.url, "/generate", running.LOST) as proxy:
            assert mend("generate", "The", "--service", proxy.url).status == 0

    def test_leaves_the_key_that_tells_when_nobody_answers_any_more(self, mend, live):
        body = live.edits[0]
        with between(live.url, "/edits", running.LOST, running.LOST) as proxy:
            ended = mend("edit", *body.values(), "--service", proxy.url, "--wait", 0)
        assert (ended.status, ended.out) == (UNREACHABLE, "")
        (key,) = proxy.keys
        assert (
            f"whether it was done is not known, and asking the same with the Idempotency-Key {key} tells"
            in ended.refusal
        )
        (made,) = live.active()
        assert json.loads(mend("edit", *body.values(), "--idempotency-key", key, "--json").out) == made


class TestNotNow:
    def test_is_asked_again_when_it_says(self, mend, live):
        start = time.monotonic()
        with between(live.url, "/edits", refusing(503, "1")) as proxy:
            ended = mend("edit", *live.edits[0].values(), "--service", proxy.url)
        assert time.monotonic() - start > 1
        assert ended.err == "mend: in a moment (not_ready); asking again in 1 s …\n"
        assert len(live.active()) == 1

    @pytest.mark.parametrize("fault", [Fault(says=(502, {}, b"<html>")), Fault(says=(504, {"Retry-After": "x"}, b""))])
    def test_so_says_a_gateway_too(self, mend, live, fault):
        with between(live.url, "/edits", fault) as proxy:
            ended = mend("edits", "--service", proxy.url)
        assert ended.status == 0
        assert "and not as mend-service does; asking again in 0.1 s …" in ended.err

    def test_for_too_long_is_an_end(self, mend, live):
        fault = refusing(503, "60")
        with between(live.url, "/edits", fault) as proxy:
            ended = mend("edit", "a", "b", "--service", proxy.url, "--json")
        assert ended.status == UNREACHABLE
        assert ended.err == "mend: in a moment (not_ready)\n"
        assert json.loads(ended.out) == json.loads(fault.says[2])

    def test_leaves_the_key_if_it_may_have_been_made(self, mend, live):
        with between(live.url, "/edits", refusing(503, None, "outcome_unknown")) as proxy:
            ended = mend("edit", "a", "b", "--service", proxy.url, "--wait", 0)
        assert ended.refusal.startswith("in a moment (outcome_unknown); whether it was done is not known, and ")
        assert proxy.keys[0] in ended.refusal

    def test_is_waited_for_until_somebody_listens(self, mend, live):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        with ExitStack() as later:
            starting = threading.Timer(0.7, lambda: later.enter_context(between(live.url, "/", port=port)))
            starting.start()
            ended = mend("generate", "The", "--service", f"http://127.0.0.1:{port}")
            starting.join()
        assert ended.status == 0, ended
        assert "Connection refused" in ended.err


class TestNobody:
    def test_listens(self, mend):
        start = time.monotonic()
        ended = mend("edit", "a", "b", "--service", "http://127.0.0.1:1", "--wait", 1)
        assert time.monotonic() - start < 5
        assert (ended.status, ended.out) == (UNREACHABLE, "")
        assert ended.err.count("asking again") == 3
        # It was never sent, so there is nothing that may have been done.
        assert ended.refusal.startswith("http://127.0.0.1:1 does not answer (")
        assert ended.refusal.endswith("); give the URL of a running service with --service or MEND_SERVICE")

    @pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:port", "x", ""])
    def test_can_be_at_such_a_url(self, mend, url):
        ended = mend("edits", "--service", url)
        assert ended.status == REFUSED
        assert "give one such as http://127.0.0.1:8000" in ended.refusal

    @pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b"\xff", b'{"detail": "x"}'])
    def test_of_ours_is_there(self, mend, body):
        with answering(body) as url:
            ended = mend("edits", "--service", url)
        assert ended.status == UNREACHABLE
        assert "answered with status 200, and not as mend-service does; give the URL" in ended.refusal

    def test_of_ours_is_where_it_is_redirected_to(self, mend, live):
        with between(live.url, "/edits", Fault(says=(301, {"Location": live.url}, b""))) as proxy:
            assert "status 301" in mend("edit", "a", "b", "--service", proxy.url).refusal

    def test_learns_the_password(self, mend):
        ended = mend("edits", "--service", "http://me:secret@127.0.0.1:1", "--wait", 0)
        assert "secret" not in ended.err
        assert "http://127.0.0.1:1" in ended.refusal


class TestCommandLine:
    @pytest.mark.parametrize(
        "given",
        [["edits", "--nothing"], ["edit", "a"], ["rollback"], ["apply"], ["edits", "--limit", "0"],
         ["edit", "a", "b", "--if-match", "x"], ["edits", "--wait", "-1"]],
    )  # fmt: skip
    def test_that_is_not_understood_is_wrong_input_and_no_drift(self, mend, given):
        ended = mend(*given)
        assert DRIFT != ended.status == REFUSED
        assert ended.out == ""

    @pytest.mark.parametrize(
        "command", ["edit", "edits", "rollback", "tag", "tags", "kill-switch", "generate", "audit", "apply"]
    )
    def test_help_names_every_exit_status(self, mend, command):
        ended = mend(command, "--help")
        assert ended.status == 0
        assert " ".join(EXIT_STATUSES.split()) in " ".join(ended.out.split())

    def test_writes_no_colours_into_a_pipe(self, mend):
        for given in (["edits", "--help"], ["edits", "--nothing"], ["edits"]):
            ended = mend(*given)
            assert "\x1b" not in ended.out + ended.err

    def test_needs_neither_torch_nor_anything_of_the_server(self, service, tmp_path):
        (tmp_path / "wanted.yaml").write_text("edits: []")
        heavy = ("torch", "transformers", "numpy", "redis", "fastapi", "uvicorn", "safetensors", "tokenizers", "tqdm")
        code = f"import sys; sys.modules.update(dict.fromkeys({heavy})); from service.cli import main; main()"
        for given in (["edits"], ["apply", str(tmp_path / "wanted.yaml"), "--check", "--no-prune"]):
            ended = subprocess.run(
                [sys.executable, "-c", code, *given],
                env={**os.environ, "MEND_SERVICE": service.url, "PYTHONPATH": os.pathsep.join(sys.path)},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert ended.returncode == 0, ended.stderr
