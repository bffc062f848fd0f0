"""Names by which a service is addressed."""

from __future__ import annotations

import ipaddress
import re

LOCALHOST = "localhost"


HOST = re.compile(r"(?:\[([^\]]*)\]|([^\[\]:]*))(?::\d*)?")


def host_name(host: str) -> str:
    """The name in a Host header, without its port: `[::1]:8000` is `::1`. Empty if it is none."""
    found = HOST.fullmatch(host.strip().lower())
    return (found[1] or found[2] or "").removesuffix(".") if found else ""


def is_address(name: str) -> bool:
    """Whether a name is an IP address, which nobody can make mean another machine, as one can a name of DNS."""
    return _address(name) is not None


def is_loopback(name: str) -> bool:
    """Whether only this machine can mean itself by a name or an address."""
    address = _address(name)
    return name == LOCALHOST or (address is not None and address.is_loopback)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
