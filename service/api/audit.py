"""The audit: who asked for what, and what came of it, in a line each. Nothing of what was said.

Every request that takes a scope beyond `read`, and every one that is kept out, leaves a line of the logger
`mend.audit`; a batch that is answered while it is worked on leaves another when it is done.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from service.api.callers import Caller, Declared
from service.api.problems import last_code

logger = logging.getLogger("mend.audit")
logger.setLevel(logging.INFO)  # whatever less of the rest is logged

REFUSALS = (401, 403, 421, 429)
CLIP = 200
"""Characters of what a client says of itself that a line shows."""


@dataclass
class Record:
    """A request, for the audit. actor: whom the caller says he asks for. declared: None if there is no such route."""

    method: str
    declared: Declared | None
    address: str
    actor: str | None
    caller: Caller | None = None

    def wanted(self, status: int | None) -> bool:
        """Whether the audit is to know of it."""
        if self.caller is None and status == 429:  # of so many attempts without a good key one more says nothing new
            return False
        return status in REFUSALS or (self.caller is not None and self.caller.demanded in ("edit", "admin"))

    def tell(self, status: int | None, **outcome: object) -> None:
        """status: None where nobody was there any more to be answered."""
        actor = self.actor and self.actor[:CLIP]
        facts = {
            "key": self.caller and self.caller.name,
            "actor": self.caller.acts_for(actor) if self.caller else None,
            "address": self.address,
            "method": self.method,
            "route": self.declared and self.declared.template,
            "status": status,
            "code": last_code(),
            **outcome,
        }
        level, said = (logging.WARNING, "kept out") if status in REFUSALS else (logging.INFO, "asked")
        logger.log(level, said, extra={name: value for name, value in facts.items() if value is not None})
