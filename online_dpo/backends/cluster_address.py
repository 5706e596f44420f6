"""Which running Ray cluster an experiment means. Knows no Ray: where Ray listens is settled before it is imported."""

from __future__ import annotations

import ipaddress
import os
import socket
import urllib.parse
from pathlib import Path

from online_dpo.errors import ConfigError, one_line

ANSWERS_S = 5.0
"""Seconds that a cluster's head has to answer."""


def find_cluster(address: str) -> str:
    """host:port of the cluster at `address`: itself, or for "auto" the one that `ray start` made this machine part of.

    Ray's own "auto" would take any Ray on the machine, other people's private ones too. Raises `ConfigError`, within
    seconds, when there is none, or nothing answers.
    """
    found = address if address != "auto" else _of_this_machine()
    parts = urllib.parse.urlsplit(f"//{found}")
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=ANSWERS_S):
            return found
    except (OSError, ValueError) as error:
        at = found if found == address else f"{address} ({found})"
        raise ConfigError(
            f"cluster.address {at}: nothing answers there ({one_line(error)}); is the cluster's head up?"
        ) from error


def join_with_token(address: str) -> None:
    """Where this machine has Ray's token, use it for the cluster "auto", as `ray start` does, unless RAY_AUTH_MODE says
    otherwise. For a host:port Ray asks that it be said. To be called before Ray is imported, which reads it then."""
    if address == "auto" and _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _has_token() -> bool:
    """In the places in which Ray looks for it."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    return (Path.home() / ".ray" / "auth_token").is_file()


def on_loopback(address: str) -> bool:
    """Whether host:port is on this machine's loopback."""
    host = urllib.parse.urlsplit(f"//{address}").hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _of_this_machine() -> str:
    """What RAY_ADDRESS says, else what `ray start` wrote down."""
    said = os.environ.get("RAY_ADDRESS", "")
    if said not in ("", "auto", "local"):
        return said
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 - Ray's own default
    file = Path(temporary) / "ray" / "ray_current_cluster"
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(
            "cluster.address auto: this machine is part of no Ray cluster (neither RAY_ADDRESS nor "
            f"{file}); start one with `ray start --head`, or leave cluster.address out"
        ) from error
