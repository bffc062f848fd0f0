"""The file of keys: what is in it, who it knows, and what becomes of it while the service runs."""

from __future__ import annotations

import json
import logging
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service.api.keys import PREFIX, Key, Keyring, KeysUnusable, changed, find, hashed, new_token, read_keys


def made(name: str, scope: str = "read", **fields: object) -> tuple[str, Key]:
    token = new_token()
    return token, Key(name=name, scope=scope, sha256=hashed(token), created_at=datetime.now(UTC), **fields)


def write(path: Path, *keys: Key) -> Path:
    with changed(path) as held:
        held[:] = keys
    return path


class TestTokens:
    def test_are_256_random_bits_behind_a_prefix(self):
        tokens = {new_token() for _ in range(100)}
        assert len(tokens) == 100
        assert all(token.startswith(PREFIX) and len(token) >= len(PREFIX) + 43 for token in tokens)

    def test_are_found_by_their_hash_alone(self):
        pairs = [made(f"key{number}") for number in range(5)]
        keys = tuple(key for _, key in pairs)
        assert [find(keys, token) for token, _ in pairs] == list(keys)
        for other in ("", "mend_", new_token(), keys[0].sha256, pairs[0][0][:-1], pairs[0][0] + "x", "ü"):
            assert find(keys, other) is None


class TestFile:
    def test_holds_no_key_and_is_its_owners_alone(self, tmp_path):
        token, key = made("ci", "edit")
        path = write(tmp_path / "keys.json", key)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert token.removeprefix(PREFIX) not in path.read_text()
        assert read_keys(path) == (key,)
        assert os.listdir(tmp_path) == ["keys.json"]

    def test_keeps_its_mode_and_is_replaced_whole(self, tmp_path):
        path = write(tmp_path / "keys.json", made("one")[1])
        path.chmod(0o640)
        before = path.stat().st_ino
        with path.open() as reader:
            write(path, made("two")[1])
            assert "one" in reader.read()
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert path.stat().st_ino != before

    def test_that_is_a_link_is_changed_where_it_lies(self, tmp_path):
        (tmp_path / "there").mkdir()
        link = tmp_path / "keys.json"
        link.symlink_to(tmp_path / "there" / "keys.json")
        write(link, made("one")[1])
        assert link.is_symlink()
        assert [key.name for key in read_keys(tmp_path / "there" / "keys.json")] == ["one"]

    def test_is_changed_by_one_at_a_time(self, tmp_path):
        path = tmp_path / "keys.json"

        def add(number: int) -> None:
            with changed(path) as held:
                held.append(made(f"key{number}")[1])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(add, range(40)))
        assert {key.name for key in read_keys(path)} == {f"key{number}" for number in range(40)}

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("", "is no file of keys: Invalid JSON"),
            ("{}", "is no file of keys: Input should be a valid"),
            ('[{"name": "a"}]', "0.scope: Field required"),
            ('[{"name": "a b", "scope": "read"}]', "0.name: String should match"),
            ('[{"name": "a", "scope": "root"}]', "0.scope: Input should be 'read', 'edit' or 'admin'"),
            ('[{"name": "a", "scope": "read", "sha256": "mend_secret"}]', "0.sha256: String should match"),
        ],
    )
    def test_that_is_none_is_named_without_what_is_in_it(self, tmp_path, text, says):
        path = tmp_path / "keys.json"
        path.write_text(text)
        with pytest.raises(KeysUnusable) as error:
            Keyring(path)
        assert says in str(error.value)
        assert str(path) in str(error.value)
        assert "secret" not in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("field", ["name", "sha256"])
    def test_names_each_key_once(self, tmp_path, field):
        (_, one), (_, other) = made("one"), made("other")
        path = tmp_path / "keys.json"
        same = other.model_copy(update={field: getattr(one, field)})
        path.write_text(json.dumps([key.model_dump(mode="json") for key in (one, same)]))
        with pytest.raises(KeysUnusable, match=f"the {field} {getattr(one, field)} is there twice"):
            read_keys(path)

    def test_that_is_missing_is_said_with_what_makes_one(self, tmp_path):
        with pytest.raises(KeysUnusable, match="mend keys create"):
            Keyring(tmp_path / "keys.json")


class TestKeyring:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "keys.json"

    def test_knows_new_keys_and_forgets_revoked_ones_at_once(self, path):
        (first, one), (second, other) = made("one"), made("other")
        ring = Keyring(write(path, one))
        assert (ring.find(first), ring.find(second)) == (one, None)
        write(path, one, other)
        assert (ring.find(first), ring.find(second)) == (one, other)
        write(path, other)
        assert (ring.find(first), ring.find(second)) == (None, other)

    def test_of_which_none_is_left_lets_nobody_in(self, path):
        token, key = made("one")
        ring = Keyring(write(path, key))
        assert ring.warnings() == []
        write(path)
        assert ring.find(token) is None
        assert any("no API key" in warning for warning in ring.warnings())

    @pytest.mark.parametrize("trouble", ["gone", "torn", "folder"])
    def test_keeps_the_last_good_keys_and_says_so_once(self, path, caplog, trouble):
        token, key = made("one")
        ring = Keyring(write(path, key))
        path.unlink()
        if trouble == "torn":
            path.write_text('[{"name": "o')
        elif trouble == "folder":
            path.mkdir()
        with caplog.at_level(logging.INFO, "mend.keys"):
            assert [ring.find(token) for _ in range(3)] == [key] * 3
        (said,) = caplog.messages
        assert str(path) in said
        assert "the keys that were read last stay good" in said
        (warning,) = ring.warnings()
        assert str(path) not in warning
        if trouble == "folder":
            path.rmdir()
        newer, other = made("other")
        path.unlink(missing_ok=True)
        write(path, other)
        assert (ring.find(token), ring.find(newer), ring.warnings()) == (None, other, [])

    def test_says_when_a_key_expired(self, path):
        now = datetime.now(UTC)
        (_, past), (_, coming) = made("a", expires_at=now - timedelta(0, 1)), made("b", expires_at=now + timedelta(1))
        assert (past.expired, coming.expired) == (True, False)
        assert read_keys(write(path, past, coming)) == (past, coming)
