"""Threads that work with memory share few of glibc's heaps, unless the operator has chosen otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from service.heap import HEAPS, OPERATORS_OWN

THREADS = 8
HEAPS_IN_USE = """
import ctypes, sys, threading
from service import heap

print(heap.settle())
libc, met = ctypes.CDLL(None), threading.Barrier(int(sys.argv[1]))
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p

def work():
    met.wait()
    libc.malloc(100_000)
    met.wait()

threads = [threading.Thread(target=work) for _ in range(met.parties)]
for thread in threads: thread.start()
for thread in threads: thread.join()
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, file), libc.fclose(file)
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def heaps(folder: Path, **chosen: str) -> tuple[str, int]:
    """What settling says in a new process, and how many heaps its threads then use."""
    others = {name: value for name, value in os.environ.items() if name not in OPERATORS_OWN}
    report = folder / "heaps.xml"
    said = subprocess.check_output(
        [sys.executable, "-c", HEAPS_IN_USE, str(THREADS), str(report)], env=others | chosen, text=True
    )
    return said.strip(), report.read_text().count("<heap nr=")


def test_threads_share_few(tmp_path):
    said, count = heaps(tmp_path)
    assert said == "True"
    assert count <= HEAPS


def test_what_the_operator_has_chosen_holds(tmp_path):
    said, count = heaps(tmp_path, MALLOC_ARENA_MAX="6")
    assert said == "False"
    assert HEAPS < count <= 6
