"""A running service, as commands talk to it.

Flow: a request, sent again while nobody answers or the service says not now -> the answer; or one line that says why
not, and an exit status. What changes something carries one Idempotency-Key however often it is sent: it is done once.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import typer

from service.cli.client_command import DEFAULT_SERVICE, KEY, REFUSED, UNREACHABLE, stop

if TYPE_CHECKING:
    import httpx

CONNECTS_WITHIN_S, ANSWERS_WITHIN_S = 10, 600
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 5
TELLS_EVERY_S = 5
"""Of the progress of a batch."""
PAGE = 500
"""Most edits that the service lists at once."""
NOT_NOW = (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)
KEY_ADVICE = {"unauthenticated": f"; give a key with {KEY} or --api-key-file"}
NEVER_BEGUN = ("not_ready", "rate_limited")
"""Codes of answers that come before anything was done."""

Got = TypeVar("Got")


class ServiceError(Exception):
    """Why there is no answer to go on with. body: of the problem that the service answered with, if it did."""

    status = REFUSED

    def __init__(self, message: str, body: str = "") -> None:
        super().__init__(message)
        self.body = body


class Refused(ServiceError):
    """The service refuses, or the request cannot even be sent. problem: as the service describes it."""

    def __init__(self, message: str, problem: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, json.dumps(problem, ensure_ascii=False) if problem else "")
        self.problem = problem or {}


class Unreachable(ServiceError):
    """Nobody answers there, or somebody else does."""

    status = UNREACHABLE


class NotNow(Unreachable):
    """Perhaps in a moment. retry_after_s: as the answer says. unknown: whether the request was carried out."""

    def __init__(self, message: str, body: str = "", *, retry_after_s: float = 0, unknown: bool) -> None:
        super().__init__(message, body)
        self.retry_after_s, self.unknown = retry_after_s, unknown


@dataclass(frozen=True)
class Answer:
    """text: the service's own body. revision: the ETag."""

    text: str
    body: dict[str, Any]
    revision: int | None


def key_headers(key_file: Path | None = None) -> dict[str, str]:
    """What shows the caller's API key, if he has one. Raises Refused when it is none."""
    try:
        key = (os.environ.get(KEY, "") if key_file is None else key_file.read_text(encoding="utf-8")).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"the API key in {key_file} cannot be read: {getattr(error, 'strerror', error)}") from error
    if key_file is not None and not key:
        raise Refused(f"{key_file} is empty; it should hold an API key")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise Refused(f"what is in {key_file or KEY} is no API key; one is like mend_…, in one line")
    return {"Authorization": f"Bearer {key}"} if key else {}


@contextmanager
def connected(url: str, wait_s: float, *, as_json: bool, key_file: Path | None = None) -> Iterator[Service]:
    """A running service. That it refuses or does not answer ends the command.

    as_json: the problem's body goes to stdout too. key_file: holds the API key, if the environment does not.
    """
    import httpx

    try:
        try:
            base = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise Refused(f"{url!r} is not a URL ({error}); give one such as {DEFAULT_SERVICE}") from error
        if base.scheme not in ("http", "https") or not base.host:
            raise Refused(f"{url!r} is not the URL of a service; give one such as {DEFAULT_SERVICE}")
        with httpx.Client(
            base_url=base,
            headers=key_headers(key_file),
            timeout=httpx.Timeout(CONNECTS_WITHIN_S, read=ANSWERS_WITHIN_S),
        ) as http:
            yield Service(http, wait_s)
    except ServiceError as error:
        if as_json and error.body:
            typer.echo(error.body)
        nobody = isinstance(error, Unreachable) and not error.body
        advice = "; give the URL of a running service with --service or MEND_SERVICE" if nobody else ""
        stop(f"{error}{advice}", error.status)


def edit_path(edit_id: str) -> str:
    return f"/edits/{quote(edit_id, safe='')}"


def told_problem(problem: Mapping[str, Any]) -> str:
    return f"{problem['detail']} ({problem['code']})"


class Service:
    """wait_s: for so long after the first time that nobody answers a request is it sent again."""

    def __init__(self, http: httpx.Client, wait_s: float) -> None:
        self._http, self._wait_s = http, wait_s
        self.url = str(http.base_url.copy_with(userinfo=b"")).rstrip("/")
        """Without the password that may be in it."""

    def read(
        self, method: str, path: str, expects: str, *, query: Mapping[str, Any] | None = None, body: Any = None
    ) -> Answer:
        """Ask for something that changes nothing. expects: a member of every such answer.

        Raises Refused, Unreachable.
        """
        return self._patiently(lambda: self._answer(method, path, expects, query, body, {}))

    def stream(self, path: str, body: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Ask for an answer in pieces: each event's name and data. Raises Refused, Unreachable.

        It is asked again only before the first piece.
        """
        opened = ExitStack()

        def begin() -> httpx.Response:
            asked = self._http.stream(
                "POST", path, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
            )
            answer = opened.enter_context(asked)
            if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                answer.read()
                self._checked(answer, "event")
            return answer

        with opened:
            for event, fields in self._events(self._patiently(begin)):
                if event == "error":
                    raise _trouble(fields)
                yield event, fields
                if event == "done":
                    return
            raise NotNow(f"the answer of {self.url} broke off", unknown=False)

    def _events(self, answer: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
        import httpx

        event = ""
        try:
            for line in _lines(answer):
                name, _, value = line.decode().partition(": ")
                if name == "event":
                    event = value
                elif name == "data":
                    yield event, json.loads(value)
        except httpx.RequestError as error:
            raise NotNow(f"the answer of {self.url} broke off ({error})", unknown=False) from error

    def change(
        self,
        method: str,
        path: str,
        expects: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        actor: str | None = None,
        if_match: int | None = None,
        key: str | None = None,
    ) -> Answer:
        """Ask for a change, once however often it is sent. key: of an earlier request that this one repeats.

        Raises Refused, Unreachable; then whether it was made may be unknown.
        """
        key = _key(query) if key is None else key
        headers = _headers(actor, if_match, key)
        return self._patiently(lambda: self._answer(method, path, expects, query, body, headers), key)

    def batch(
        self,
        edits: Iterable[Mapping[str, Any]],
        query: Mapping[str, Any],
        *,
        actor: str | None,
        if_match: int | None,
    ) -> dict[str, Any]:
        """Ask for many edits at once, as JSON Lines: the answer begins while they are worked on, and is told of.

        Raises Refused, whose problem has every edit's verdict; Unreachable.
        """
        key = _key(query)
        headers = _headers(actor, if_match, key) | {"Content-Type": "application/x-ndjson"}
        lines = "\n".join(map(json.dumps, edits)).encode()

        def once() -> dict[str, Any]:
            with self._http.stream("POST", "/edits/batch", params=query, content=lines, headers=headers) as answer:
                if not answer.headers.get("content-type", "").startswith("application/x-ndjson"):
                    answer.read()
                    return self._checked(answer, "edits")
                return _told(answer)

        return self._patiently(once, key)

    def edits(self, query: Mapping[str, Any], most: int | None) -> Iterator[Answer]:
        """Pages of the edits that are asked for, newest first; most: edits of all pages. Raises as `read` does."""
        cursor = None
        while True:
            limit = PAGE if most is None else min(PAGE, most)
            page = self.read("GET", "/edits", "items", query={**query, "limit": limit, "cursor": cursor})
            yield page
            cursor, most = page.body["next_cursor"], most and most - len(page.body["items"])
            if cursor is None or most == 0:
                return

    def _patiently(self, once: Callable[[], Got], key: str | None = None) -> Got:
        """What `once` comes to, tried until it is known. key: the Idempotency-Key that it sends."""
        deadline, unknown, own_pause_s = None, False, FIRST_PAUSE_S
        while True:
            try:
                return self._sent(once)
            except NotNow as trouble:
                now, unknown = time.monotonic(), unknown or trouble.unknown
                deadline = deadline or now + self._wait_s
                pause_s = max(trouble.retry_after_s, own_pause_s)
                if now + pause_s > deadline:
                    if key and unknown:
                        raise NotNow(
                            f"{trouble}; whether it was done is not known, and asking the same with the "
                            f"Idempotency-Key {key} tells, without doing it twice",
                            trouble.body,
                            unknown=True,
                        ) from trouble
                    raise
                typer.echo(f"mend: {trouble}; asking again in {pause_s:g} s …", err=True)
                time.sleep(pause_s)
                own_pause_s = min(LONGEST_PAUSE_S, 2 * own_pause_s)

    def _sent(self, once: Callable[[], Got]) -> Got:
        import httpx

        try:
            return once()
        except (httpx.UnsupportedProtocol, httpx.LocalProtocolError, UnicodeEncodeError) as error:
            raise Refused(f"this cannot be sent: {error}") from error
        except httpx.RequestError as error:
            never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            why = str(error) or type(error).__name__
            raise NotNow(f"{self.url} does not answer ({why})", unknown=not never_sent) from error

    def _answer(
        self,
        method: str,
        path: str,
        expects: str,
        query: Mapping[str, Any] | None,
        body: Any,
        headers: Mapping[str, Any],
    ) -> Answer:
        given = {name: value for name, value in (query or {}).items() if value is not None}
        content = None
        if body is not None:
            # In ASCII, so that the service says what is wrong with text that is not Unicode.
            content, headers = json.dumps(body).encode(), {**headers, "Content-Type": "application/json"}
        answer = self._http.request(method, path, params=given, content=content, headers=headers)
        tag = answer.headers.get("etag", "").removeprefix("W/").strip('"')
        return Answer(answer.text, self._checked(answer, expects), int(tag) if tag.isdigit() else None)

    def _checked(self, answer: httpx.Response, expects: str) -> dict[str, Any]:
        """The body of a good answer. Raises Refused, Unreachable, NotNow."""
        try:
            body = answer.json()
        except ValueError:
            body = None
        fields = body if isinstance(body, dict) else {}
        if answer.is_success and expects in fields:
            return fields
        after = answer.headers.get("retry-after", "")
        after_s = float(after) if after.isdigit() else 0
        if {"detail", "code", "status"} <= fields.keys():
            raise _trouble(fields, after_s)
        why = f"{self.url} answered with status {answer.status_code}, and not as mend-service does"
        if answer.status_code in NOT_NOW:
            raise NotNow(why, retry_after_s=after_s, unknown=True)
        raise Unreachable(why)


def _told(answer: httpx.Response) -> dict[str, Any]:
    """What the lines of a batch's answer come to. Raises Refused, NotNow."""
    edits, last_told = [], time.monotonic()
    for line in _lines(answer):
        ((kind, fields),) = json.loads(line).items()
        if kind == "edit":
            edits.append(fields)
        elif kind == "batch":
            return {**fields, "edits": edits}
        elif kind == "problem":
            raise _trouble({**fields, "edits": edits} if edits else fields)
        elif time.monotonic() - last_told >= TELLS_EVERY_S:
            last_told = time.monotonic()
            typer.echo(f"mend: {fields['step']} {fields['done']}/{fields['of']} …", err=True)
    raise NotNow(f"the answer of {answer.url.host} broke off", unknown=True)


def _trouble(problem: dict[str, Any], retry_after_s: float = 0) -> ServiceError:
    later = (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS)
    if problem["status"] in later or problem["code"] == "request_in_flight":
        body, unknown = json.dumps(problem, ensure_ascii=False), problem["code"] not in NEVER_BEGUN
        return NotNow(told_problem(problem), body, retry_after_s=retry_after_s, unknown=unknown)
    return Refused(f"{told_problem(problem)}{KEY_ADVICE.get(problem['code'], '')}", problem)


def _key(query: Mapping[str, Any] | None) -> str | None:
    """A new Idempotency-Key. A dry run needs none: it makes nothing, however often it is asked for."""
    return None if query and query.get("dry_run") else uuid.uuid4().hex


def _headers(actor: str | None, if_match: int | None, key: str | None) -> dict[str, bytes]:
    headers = {
        "X-Actor": actor,
        "If-Match": None if if_match is None else f'"{if_match}"',
        "Idempotency-Key": key,
    }
    try:
        return {name: value.encode("latin-1") for name, value in headers.items() if value is not None}
    except UnicodeEncodeError as error:
        raise Refused(f"{error.object!r} cannot be sent in an HTTP header; use Latin letters") from error


def _lines(answer: httpx.Response) -> Iterator[bytes]:
    """The lines that end in a newline. httpx's own iter_lines splits at U+2028 and its like too, inside of texts."""
    rest = b""
    for piece in answer.iter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
