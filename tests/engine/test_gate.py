"""The gate: many readers or one publisher, and nobody waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from service.engine.gate import Gate

SOON_S = 60
MOMENT_S = 0.05


@contextmanager
def in_thread(work: Callable[[], object]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield thread
    thread.join(SOON_S)
    assert not thread.is_alive()


class TestReading:
    def test_many_at_once(self):
        gate, together = Gate(), threading.Barrier(3, timeout=SOON_S)

        def read() -> None:
            with gate.reading():
                together.wait()

        with in_thread(read), in_thread(read), gate.reading():
            together.wait()
        assert not together.broken

    def test_waits_while_somebody_publishes(self):
        gate, inside = Gate(), threading.Event()

        def read() -> None:
            with gate.reading():
                inside.set()

        with gate.publishing():
            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            assert not inside.wait(MOMENT_S)
        assert inside.wait(SOON_S)
        reader.join(SOON_S)


class TestPublishing:
    def test_waits_until_the_last_reader_has_left(self):
        gate, published = Gate(), threading.Event()

        def publish() -> None:
            with gate.publishing():
                published.set()

        with gate.reading():
            publisher = threading.Thread(target=publish, daemon=True)
            publisher.start()
            assert not published.wait(MOMENT_S)
        assert published.wait(SOON_S)
        publisher.join(SOON_S)

    def test_one_at_a_time(self):
        gate, inside, most = Gate(), [], []

        def publish() -> None:
            for _ in range(50):
                with gate.publishing():
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()

        with in_thread(publish), in_thread(publish), in_thread(publish):
            pass
        assert set(most) == {1}

    def test_is_not_starved_by_readers_that_overlap_without_end(self):
        gate, done = Gate(), threading.Event()
        reads: list[int] = []

        def read() -> None:
            while not done.is_set():
                with gate.reading():
                    time.sleep(0.002)
                reads.append(1)

        waits = []
        with in_thread(read), in_thread(read), in_thread(read), in_thread(read):
            while len(reads) < 8:
                time.sleep(0.001)
            for _ in range(20):
                start = time.monotonic()
                with gate.publishing():
                    waits.append(time.monotonic() - start)
            done.set()
        assert max(waits) < 5


class TestAnException:
    @pytest.mark.parametrize("entered", ["reading", "publishing"])
    def test_inside_leaves_the_gate_open(self, entered):
        gate = Gate()
        with pytest.raises(ZeroDivisionError), getattr(gate, entered)():
            raise ZeroDivisionError
        passed = threading.Event()

        def pass_through() -> None:
            with gate.publishing(), pytest.raises(ValueError, match="again"):
                raise ValueError("again")
            with gate.reading():
                passed.set()

        with in_thread(pass_through):
            assert passed.wait(SOON_S)
