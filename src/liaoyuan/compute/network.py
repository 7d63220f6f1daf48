"""This host among others: its name, the address at which they reach it, and the interface behind that address."""

import contextlib
import fcntl
import os
import socket
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path

from liaoyuan.compute.board import Member
from liaoyuan.errors import LiaoyuanError

LOOPBACK = "127.0.0.1"
SIOCGIFADDR = 0x8915  # from linux/sockios.h: the address of an interface


def this_host(slots: int, address: str | None = None) -> Member:
    """Return this host as a member. `address`: where other hosts reach it (default: what its name resolves to).

    Raises:
        LiaoyuanError: the address is not this host's.
    """
    host = socket.gethostname()
    if address:
        listen(address).close()  # a mistake is told before the others are kept waiting
    return Member(
        id=f"{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}",
        host=host,
        machine=address or _machine(host),
        address=address or _address(host),
        slots=slots,
    )


def listen(address: str) -> socket.socket:
    """Open a socket on a free port of `address`, and of no other; raises LiaoyuanError if it is not this host's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, 0), family=family, backlog=1024)
    except OSError as error:
        raise LiaoyuanError(
            f"This host cannot listen on {address}: {error.strerror}. "
            "Give --address the address at which the other hosts reach it."
        ) from error


def _machine(host: str) -> str:
    """Return what tells this machine from others: its name, and the boot (names of containers may repeat)."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{host}/{boot.read_text().strip() if boot.exists() else ''}"


def _address(host: str) -> str:
    """Return the first address of this host that is not loopback, as its name resolves; loopback if there is none."""
    with contextlib.suppress(OSError):
        for found in _addresses(host):
            if not found.startswith("127."):
                return found
    return LOOPBACK


def _addresses(host: str) -> Iterator[str]:
    for *_, place in socket.getaddrinfo(host, None, family=socket.AF_INET, type=socket.SOCK_STREAM):
        yield str(place[0])


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has this IPv4 address; None if there is none, or no way to ask."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        wanted = socket.gethostbyname(address)
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == wanted:
                    return name
    return None
