"""A line per event, whoever logged it and whatever is in it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from structlog.contextvars import bound_contextvars

from service import logs
from service.confidential import LEFT_OUT

NASTY = 'one\ntwo\r\x1b[31mred\u2028{"level": "error"}'


def rendered(form: logs.Format, message: str, *arguments: object, exc_info: object = None, **extra: object) -> str:
    record = logging.getLogger("mend.audit").makeRecord(
        "mend.audit", logging.WARNING, __file__, 1, message, arguments, exc_info, extra=extra
    )
    return logs.formatter(form).format(record)


class TestJson:
    def test_has_when_how_bad_who_what_and_the_rest(self):
        line = json.loads(rendered("json", "made %d", 3, actor="alice", edits=[1, 2]))
        said_at = datetime.fromisoformat(line.pop("timestamp"))
        assert said_at.utcoffset() == timedelta(0)
        assert abs(datetime.now(UTC) - said_at) < timedelta(seconds=5)
        assert list(line.items()) == [
            ("level", "warning"), ("logger", "mend.audit"), ("event", "made 3"), ("actor", "alice"), ("edits", [1, 2]),
        ]  # fmt: skip

    def test_carries_the_request(self):
        with bound_contextvars(request_id="mine"):
            assert json.loads(rendered("json", "made"))["request_id"] == "mine"
        assert "request_id" not in json.loads(rendered("json", "made"))

    def test_is_one_line_whatever_is_in_it(self):
        line = rendered("json", NASTY, note=NASTY, thing=object())
        assert line.isascii()
        assert line.isprintable()
        said = json.loads(line)
        assert (said["event"], said["note"], said["level"]) == (NASTY, NASTY, "warning")
        assert said["thing"].startswith("<object object")

    def test_has_an_exception_in_one_field(self):
        try:
            raise ValueError(NASTY)
        except ValueError:
            line = rendered("json", "failed", exc_info=sys.exc_info())
        assert len(line.splitlines()) == 1
        told = json.loads(line)["exception"]
        assert told.startswith("Traceback (most recent call last):\n")
        assert told.endswith(f"ValueError: {LEFT_OUT}")


class TestText:
    def test_is_to_be_read(self):
        with bound_contextvars(request_id="mine"):
            line = rendered("text", "made %d", 3, actor="alice")
        timestamp, rest = line.split(" ", 1)
        assert datetime.fromisoformat(timestamp).utcoffset() == timedelta(0)
        assert " ".join(rest.split()) == "[warning ] made 3 [mend.audit] request_id=mine actor=alice"

    def test_is_one_line_without_colours_of_others_whatever_is_in_it(self):
        line = rendered("text", NASTY, note=NASTY)
        assert line.isprintable()
        assert "one\\ntwo" in line

    def test_has_an_exception_below_and_no_values_of_variables(self):
        secret = "swordfish".upper()
        try:
            raise ValueError(len(secret))
        except ValueError:
            line = rendered("text", "failed", exc_info=sys.exc_info())
        assert line.splitlines()[-1] == f"ValueError: {LEFT_OUT}"
        assert secret not in line


SAYS = """
import logging, sys, threading, warnings
before = logging.getLogger("library.of.others")
before.addHandler(logging.StreamHandler(sys.stdout))
before.propagate = False
from service import logs
logs.configure("json", "{level}")
logs.adopt()
before.warning("one of others")
logging.getLogger("mend.access").debug("one of ours")
logging.getLogger("library.of.others").debug("noise")
warnings.warn("a warning")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise RuntimeError("the end")
"""


@pytest.mark.parametrize(
    ("level", "ours"), [("debug", ["one of others", "one of ours"]), ("warning", ["one of others"]), ("error", [])]
)
def test_whatever_a_process_says_is_logged(level, ours):
    said = [sys.executable, "-W", "always", "-c", SAYS.format(level=level)]
    ended = subprocess.run(said, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    warned = [] if level == "error" else ["py.warnings"]
    assert [line["logger"] for line in lines[len(ours) :]] == [*warned, "mend", "mend"]
    assert [line["event"] for line in lines[: len(ours)]] == ours
    assert [line["exception"].splitlines()[-1] for line in lines[-2:]] == [
        f"ZeroDivisionError: {LEFT_OUT}", f"RuntimeError: {LEFT_OUT}",
    ]  # fmt: skip
