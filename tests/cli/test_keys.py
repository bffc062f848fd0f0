"""`mend keys`, and a service that has some, as the other commands and its log show it."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service.api.keys import PREFIX, SCOPES, Keyring, changed
from service.cli.client_command import REFUSED, ClientCommand
from service.cli.main import app
from tests.api.test_keys import made
from tests.cli.running import Ended, Live, live_service, run_mend
from tests.service_fixtures import never_takes

Mend = Callable[..., Ended]


@pytest.fixture
def mend(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mend:
    for name in ("MEND_API_KEYS", "MEND_API_KEY", "MEND_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: run_mend(monkeypatch, capsys, *arguments)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mend: Mend) -> Path:
    """Where the commands find the keys."""
    path = tmp_path / "keys.json"
    monkeypatch.setenv("MEND_API_KEYS", str(path))
    return path


class TestKeys:
    def test_are_told_once_and_good_from_then_on(self, mend, file):
        ended = mend("keys", "create", "ci", "--scope", "edit")
        token = ended.out.strip()
        assert (ended.status, ended.out) == (0, f"{token}\n")
        assert token.startswith(PREFIX)
        assert "not shown again" in ended.err
        assert token not in ended.err + file.read_text() + mend("keys", "list").out
        key = Keyring(file).find(token)
        assert (key.name, key.scope, key.expires_at) == ("ci", "edit", None)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def test_may_be_good_for_some_days_only(self, mend, file):
        mend("keys", "create", "visitor", "--scope", "read", "--days", "7")
        (key,) = json.loads(mend("keys", "list", "--json").out)
        left = datetime.fromisoformat(key["expires_at"]) - datetime.now(UTC)
        assert timedelta(6.9) < left <= timedelta(7)

    def test_are_listed_without_their_hashes(self, mend, file):
        for scope in ("read", "admin"):
            mend("keys", "create", f"{scope}er", "--scope", scope)
        first, second = mend("keys", "list").out.splitlines()
        assert first.split()[:2] == ["reader", "read"]
        assert second.split()[:2] == ["adminer", "admin"]
        listed = json.loads(mend("keys", "list", "--json").out)
        assert [set(key) for key in listed] == [{"name", "scope", "created_at", "expires_at"}] * 2

    def test_are_revoked_by_name(self, mend, file):
        one, other = (mend("keys", "create", name, "--scope", "read").out.strip() for name in ("one", "other"))
        assert mend("keys", "revoke", "one").status == 0
        ring = Keyring(file)
        assert (ring.find(one), ring.find(other).name) == (None, "other")

    def test_may_lie_in_a_file_that_is_named(self, mend, tmp_path):
        file = tmp_path / "mine.json"
        token = mend("keys", "create", "me", "--scope", "admin", "--file", file).out.strip()
        assert Keyring(file).find(token).scope == "admin"

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            (["create", "ci", "--scope", "edit"], "there is a key named ci already"),
            (["create", "two words", "--scope", "edit"], "is no name of a key"),
            (["create", "ci (for me)", "--scope", "edit"], "is no name of a key"),
            (["create", "x" * 65, "--scope", "edit"], "is no name of a key"),
            (["revoke", "nobody"], "there is no key named nobody"),
            (["list", "--file", "nothing.json"], "nothing.json cannot be read: No such file"),
            (["revoke", "ci", "--file", "nothing.json"], "nothing.json cannot be read: No such file"),
            (["create", "ci", "--scope", "edit", "--file", "no/folder.json"], "no cannot be opened: No such file"),
        ],
    )
    def test_are_refused_in_a_line(self, mend, file, monkeypatch, capsys, given, says):
        mend("keys", "create", "ci", "--scope", "read")
        monkeypatch.chdir(file.parent)
        before = file.read_bytes()
        assert says in mend("keys", *given).refusal
        assert file.read_bytes() == before
        assert [path.name for path in file.parent.iterdir()] == ["keys.json"]

    def test_need_a_file(self, mend):
        assert "MEND_API_KEYS" in mend("keys", "list").refusal


@dataclass(frozen=True)
class Keyed:
    """A service with a key of each scope, each named by it."""

    live: Live
    file: Path
    log: Path
    keys: dict[str, str]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("keyed")
    pairs = {scope: made(scope, scope) for scope in SCOPES}
    with changed(folder / "keys.json") as held:
        held += [key for _, key in pairs.values()]
    keys = {scope: token for scope, (token, _) in pairs.items()}
    with live_service(folder, MEND_API_KEYS=str(folder / "keys.json")) as live:
        live.server.client.headers["Authorization"] = f"Bearer {keys['admin']}"
        yield Keyed(live, folder / "keys.json", folder / "log", keys)


def test_every_command_that_asks_a_service_takes_a_key(mend):
    asks = [each.callback.__name__ for each in app.registered_commands if each.cls is ClientCommand]
    assert {"edit", "edits", "rollback", "generate", "audit", "apply"} <= set(asks)
    for name in [*asks, "export"]:
        assert "--api-key-file" in mend(name.replace("_", "-"), "--help").out


class TestAServiceThatHasKeys:
    @pytest.fixture
    def ask(self, keyed: Keyed, mend: Mend, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
        """A command with the key of a scope, or with another text for one."""
        monkeypatch.setenv("MEND_SERVICE", keyed.live.url)

        def ask(who: str | None, *arguments: object) -> Ended:
            if who is not None:
                monkeypatch.setenv("MEND_API_KEY", keyed.keys.get(who, who))
            else:
                monkeypatch.delenv("MEND_API_KEY", raising=False)
            return mend(*arguments)

        return ask

    def test_is_asked_with_the_key_of_the_environment(self, keyed, ask):
        body = keyed.live.edits[0]
        ended = ask("edit", "edit", body["prompt"], body["correction"], "--actor", "me", "--json")
        assert ended.status == 0, ended
        edit = json.loads(ended.out)
        assert edit["actor"] == "edit (for me)"
        assert ask("read", "edits", edit["id"]).out.startswith(edit["id"])
        assert ask("read", "generate", body["prompt"]).status == 0
        assert ask("edit", "audit", "--fresh").status == 0
        assert ask("edit", "rollback", edit["id"]).status == 0

    def test_applies_a_file(self, keyed, ask, tmp_path):
        wanted = tmp_path / "corrections.jsonl"
        wanted.write_text(json.dumps(keyed.live.edits[0]))
        assert ask("read", "apply", wanted, "--yes").refusal.endswith("(forbidden)")
        assert ask("edit", "apply", wanted, "--yes").status == 0
        keyed.live.clear()

    def test_gives_its_export_to_whom_it_may(self, keyed, ask, tmp_path, monkeypatch, capsys):
        keyed.live.post(keyed.live.edits[0])
        given = ("export", "--format", "factors", "--out", tmp_path / "out", "--service", keyed.live.url)
        with pytest.raises(
            AssertionError, match=r"this takes a key of scope admin, and edit has scope edit.*\(forbidden"
        ):
            ask("edit", *given)
        assert ask("admin", *given).status == 0
        keyed.live.clear()

    def test_is_asked_with_the_key_of_a_file(self, keyed, ask, tmp_path, monkeypatch):
        file = tmp_path / "key"
        file.write_text(f"{keyed.keys['read']}\n")
        assert ask("nonsense", "audit", "--api-key-file", file).status == 0
        monkeypatch.setenv("MEND_API_KEY_FILE", str(file))
        assert ask(None, "edits").status == 0

    @pytest.mark.parametrize(
        ("who", "command", "says"),
        [
            (None, ["edits"], "; give a key with MEND_API_KEY or --api-key-file"),
            ("mend_wrong", ["generate", "The"], "was revoked (unauthenticated); give a key with MEND_API_KEY"),
            ("read", ["edit", "a", "b"], "this takes a key of scope edit, and read has scope read"),
            ("read", ["rollback", "edit_1"], "(forbidden)"),
            ("read", ["audit", "--fresh"], "(forbidden)"),
            ("two words", ["edits"], "is no API key"),
            ("ключ", ["edits"], "is no API key"),
            (None, ["edits", "--api-key-file", "/nothing/there"], "/nothing/there cannot be read: No such file"),
        ],
    )
    def test_refuses_in_a_line(self, ask, who, command, says):
        ended = ask(who, *command)
        assert ended.status == REFUSED
        assert says in ended.err
        assert len(ended.err.splitlines()) == 1

    def test_lets_nobody_in_whose_key_was_revoked_while_it_runs(self, keyed, ask):
        token = ask(None, "keys", "create", "visitor", "--scope", "read", "--file", keyed.file).out.strip()
        assert ask(token, "edits").status == 0
        assert ask(None, "keys", "revoke", "visitor", "--file", keyed.file).status == 0
        assert "was revoked" in ask(token, "edits").refusal

    def test_has_a_log_of_who_did_what_and_of_nothing_that_was_said(self, keyed, ask):
        """Behind all tests of this class, so that it has seen something."""
        ask("read", "generate", "Xanadu marker")
        prompt, correction = never_takes().prompt, never_takes().correction
        ask("edit", "edit", f"Xanadu {prompt}", correction)
        keyed.live.server.client.get("/generate", params={"prompt": "Xanadu"})
        log = keyed.log.read_text()
        (line,) = [line for line in log.splitlines() if "mend.audit" in line and "did_not_take" in line]
        for fact in ("key=edit", "actor=edit", "address=127.0.0.1", "method=POST", "route=/edits", "status=422"):
            assert fact in line.split()
        assert "Xanadu" not in log
        assert correction.strip() not in log
        assert not any(key in log for key in keyed.keys.values())
        assert "Traceback" not in log
