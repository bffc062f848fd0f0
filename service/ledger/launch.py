"""Become the embedded Redis server: bind its life to the service's, then exec it.

Run as a file of its own: `python -I -S launch.py <service pid> <lock fd> <command>…`. The other way, a `preexec_fn`,
would run Python between fork and exec of a process full of threads, where any lock may be held for ever.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(service: int, lock: int, command: list[str]) -> None:
    if sys.platform == "linux":
        # Survives exec. Fires when the *thread* that spawned us ends: EmbeddedRedis keeps one for this.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != service:
        sys.exit("the service ended before its Redis server was started")
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    try:
        os.execv(command[0], command)
    except OSError as error:
        sys.exit(f"cannot execute {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
