"""A real run that is looked at from outside while it works: what its processes listen on, and what it leaves behind."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

LISTENS = "0A"
"""The state of a listening socket in /proc/net/tcp."""


def listening(session: int) -> set[tuple[str, str]]:
    """(address, command) of every TCP socket on which a process of session `session` waits for others."""
    owners = dict(_sockets(session))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text(encoding="utf-8").splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == LISTENS and rest[5] in owners:
                found.add((_address(local), owners[rest[5]]))
    return found


def beyond_loopback(sockets: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those that another machine could reach."""
    return {one for one in sockets if not ipaddress.ip_address(one[0].rpartition(":")[0]).is_loopback}


def _sockets(session: int) -> Iterator[tuple[str, str]]:
    """(inode, command) of the sockets that processes of the session hold."""
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or os.getsid(int(entry.name)) != session:
                continue
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:60]
            for handle in (entry / "fd").iterdir():
                target = os.readlink(handle)
                if target.startswith("socket:["):
                    yield target[8:-1], command
        except OSError:  # gone meanwhile
            continue


def _address(local: str) -> str:
    """`0100007F:1F90` as 127.0.0.1:8080. The kernel writes words of 4 bytes in the machine's own order."""
    host, port = local.split(":")
    words = [struct.pack("=I", int(host[at : at + 8], 16)) for at in range(0, len(host), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    address = ipaddress.ip_address(socket.inet_ntop(family, b"".join(words)))
    mapped = getattr(address, "ipv4_mapped", None)
    return f"{mapped or address}:{int(port, 16)}"
