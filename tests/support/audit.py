"""An audit hook for the whole test session: no connection leaves the machine, and unpickling can be watched.

Audit hooks see what the interpreter really does, whichever library asks for it, and cannot be removed.
"""

import ipaddress
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_unpickled: list[str] | None = None  # a list while somebody watches


def install() -> None:
    sys.addaudithook(_hook)


@contextmanager
def no_unpickling() -> Iterator[None]:
    """Fail when a pickle names a class or function inside the block, even if the caller swallows the error."""
    global _unpickled
    _unpickled = seen = []
    try:
        yield
    finally:
        _unpickled = None
    assert not seen, f"unpickled {seen}"


def is_loopback(address: object) -> bool:
    """Whether a socket address stays on this machine; file sockets do."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hook(event: str, args: tuple[object, ...]) -> None:
    if event == "socket.connect" and not is_loopback(args[1]):
        raise RuntimeError(f"tests run without a network, but something connects to {args[1]}.")
    if event == "pickle.find_class" and _unpickled is not None:
        _unpickled.append(".".join(map(str, args)))
        raise RuntimeError(f"something unpickles {_unpickled[-1]}.")
