"""How long each step of a change takes."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from service.failpoints import reach
from service.telemetry import Attribute, Step, Telemetry


class Clock:
    """Milliseconds per step, added up by name. A step ends where the next one begins, and its end is a failpoint.

    A context manager, so that the last step ends too, however it ends. What telemetry is told has no other source.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self.laps: dict[str, float] = {}
        self._telemetry = telemetry
        self._step: Step | None = None

    def begin(self, name: str, **attributes: Attribute) -> None:
        """The step before is over, and this one begins."""
        self.end()
        self._step = self._telemetry.step(name, **attributes)

    def end(self) -> None:
        """The step is over, and none begins."""
        if self._step is not None:
            step, self._step = self._step, None
            self.laps[step.name] = round(self.laps.get(step.name, 0.0) + 1000 * step.end(), 3)
            reach(step.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if error is None:
            self.end()
        elif self._step is not None:
            self._step.end(error)
