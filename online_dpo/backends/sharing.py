"""`ray.put` that ends in an error where this machine's Ray server has ended, and not in this process's silent end."""

from __future__ import annotations

import socket
from typing import Any

import ray

from online_dpo.errors import OnlineDPOError


def share(value: Any, kind: type[OnlineDPOError]) -> Any:
    """A reference to `value` that several calls may be given.

    The object store is a part of Ray's server on this machine. A client whose store is gone ends its process at once,
    with status 1 and no word (Ray 2.60: "Terminate the process"), so the store is knocked at first. Raises `kind`, as
    of a process that ended.
    """
    try:
        _knock()
    except OSError as error:
        lost = kind(f"this machine's Ray server (raylet) ended: {error}")
        lost.process_ended = True
        raise lost from error
    return ray.put(value)


def _knock() -> None:
    """Connect to the object store of this process's node, and leave. Raises `OSError` where nobody is there."""
    here = ray.get_runtime_context().get_node_id()
    name = next(node["ObjectStoreSocketName"] for node in ray.nodes() if node["NodeID"] == here)
    with socket.socket(socket.AF_UNIX) as store:
        store.connect(name)
