"""Policies on nodes that do not see the run folder: each folder's bytes travel once a node, and stay there for a while.

A node that sees the folder under the same path reads it as it is. On any other one a keeper, one small process a node,
writes what it is sent into a folder of its own on that node's disk and holds it against the policy's digest.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from online_dpo.backends.ray_cluster import wait
from online_dpo.backends.sharing import share
from online_dpo.errors import EngineError, RunFolderError
from online_dpo.models import PICKLES, digest_folder
from online_dpo.policies import read_policy
from online_dpo.types import Policy

CHUNK = 32 * 2**20
"""Bytes that are under way at once: what a transfer costs in memory, whatever the size of the weights."""
KEPT = 4
"""Policies that a node keeps beside the initial one: those of one training job, and the one before."""
PREFIX = "online-dpo-weights-"


class NodeKeeper:
    """Runs on one node: looks at its files, and keeps the policies that were sent to it."""

    def __init__(self) -> None:
        _forget_dead()
        self.root = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))

    def sees(self, path: Path) -> bool:
        """Whether this node has `path`."""
        return path.exists()

    def has(self, policy: Policy, sizes: dict[str, int]) -> bool:
        """Whether the policy's folder is here, under the driver's path: same files, same digest.

        A trained policy's digest is the recorded one (the engine's probe then tells its weights); an initial model
        has no record, and is read once.
        """
        try:
            if file_sizes(policy.path) != sizes:
                return False
            if (policy.path / "policy.json").exists():
                return read_policy(policy.path, verify=False).digest == policy.digest
            return digest_folder(policy.path) == policy.digest
        except (OSError, RunFolderError):
            return False

    def append(self, digest: str, name: str, data: bytes) -> None:
        """Add `data` to file `name` of the policy `digest`, which is being sent."""
        folder = self.root / f".{digest}"
        folder.mkdir(exist_ok=True)
        with (folder / Path(name).name).open("ab") as file:
            file.write(data)

    def finish(self, digest: str) -> Path:
        """All of policy `digest` has been sent: its folder here. Raises `EngineError` when it is another one's."""
        aside, folder = self.root / f".{digest}", self.root / digest
        if digest_folder(aside) != digest:
            shutil.rmtree(aside)
            raise EngineError(f"a policy arrived damaged on node {ray.util.get_node_ip_address()}: its digest differs")
        aside.rename(folder)
        return folder

    def drop(self, digest: str) -> None:
        """The policy is not needed here any more."""
        shutil.rmtree(self.root / digest, ignore_errors=True)

    def empty(self) -> Path:
        """The name of a folder that is not there yet, for a policy that is trained here."""
        return self.root / f"trained-{uuid.uuid4().hex}"

    def read(self, folder: Path) -> Iterator[tuple[str, bytes]]:
        """The files of `folder` by name, in pieces; then the folder is deleted."""
        for file in sorted(folder.iterdir()):
            yield from pieces(file)
        shutil.rmtree(folder)

    def close(self) -> None:
        """Delete all that was kept."""
        shutil.rmtree(self.root, ignore_errors=True)


class NodeFiles:
    """The driver's side: brings policies to nodes, at most once each, and counts what travelled."""

    def __init__(self, nodes: Iterable[str], *, copy: bool) -> None:
        """`nodes`: those that the run's processes are on. `copy`: to all of them, whether or not they see the path."""
        self.here = ray.get_runtime_context().get_node_id()
        self.copy = copy
        self.keepers: dict[str, ActorHandle] = {
            node: _start_keeper(node) for node in sorted(set(nodes)) if copy or node != self.here
        }
        self.paths: dict[tuple[str, str], Path] = {}
        """(node, policy's digest) -> where it lies there, in the order of last use."""
        self.staying: set[str] = set()
        self.sent: Counter[str] = Counter()
        """Policies that travelled, by node."""
        self.bytes = 0
        """What they came to, over all nodes."""

    def bring(self, policy: Policy, nodes: Iterable[str], *, stay: bool = False) -> dict[str, Policy]:
        """`policy` as each of `nodes` can read it; sent to those that cannot see it. `stay`: it is never dropped."""
        wanted = sorted(set(nodes))
        if stay:
            self.staying.add(policy.digest)
        unknown = [node for node in wanted if node in self.keepers and (node, policy.digest) not in self.paths]
        if unknown:
            self._find_or_send(policy, unknown)
        return {node: _at(policy, self._path(node, policy)) for node in wanted}

    def all_see(self, folder: Path, nodes: Iterable[str]) -> dict[str, bool]:
        """Of each node, whether a file that is made in `folder` here is there too."""
        marker = folder / f".seen-{uuid.uuid4().hex}"
        marker.touch()
        try:
            asked = {node: self.keepers[node].sees.remote(marker) for node in set(nodes) if node != self.here}
            found = {node: bool(_get(reference)) for node, reference in asked.items()}
        finally:
            marker.unlink()
        return found | {node: True for node in nodes if node == self.here}

    def empty(self, node: str) -> Path:
        """The name of a folder on `node`, not there yet, for a policy that is trained there."""
        path: Path = _get(self.keepers[node].empty.remote())
        return path

    def fetch(self, node: str, folder: Path, out: Path) -> None:
        """Bring `folder` from `node` to `out` on this machine; it is gone there afterwards."""
        out.mkdir()
        for reference in self.keepers[node].read.options(num_returns="streaming").remote(folder):
            name, data = _get(reference)
            with (out / Path(name).name).open("ab") as file:
                file.write(data)

    def describe(self) -> str:
        """What travelled, in one line."""
        copies, nodes = self.sent.total(), len(self.sent)
        return f"weights: {copies} copies to {nodes} node(s), each policy once a node, {self.bytes / 1e6:.1f} MB in all"

    def close(self) -> None:
        """Delete what the nodes keep, and end the keepers."""
        for keeper in self.keepers.values():
            # A node that is gone has nothing left to delete.
            with suppress(EngineError):
                _get(keeper.close.remote())
            ray.kill(keeper)
        self.keepers.clear()

    def _path(self, node: str, policy: Policy) -> Path:
        if node not in self.keepers:
            return policy.path.absolute()
        # Moved to the end: the oldest are dropped first.
        path = self.paths.pop((node, policy.digest))
        self.paths[node, policy.digest] = path
        return path

    def _find_or_send(self, policy: Policy, nodes: list[str]) -> None:
        source = _at(policy, policy.path.absolute())
        missing = nodes
        if not self.copy:
            asked = {node: self.keepers[node].has.remote(source, file_sizes(source.path)) for node in nodes}
            missing = [node for node, reference in asked.items() if not _get(reference)]
        self.paths |= {(node, policy.digest): source.path for node in nodes if node not in missing}
        if missing:
            self._send(source, missing)

    def _send(self, policy: Policy, nodes: list[str]) -> None:
        for file in files_of(policy.path):
            for name, data in pieces(file):
                shared = share(data, EngineError)
                self.bytes += len(data) * len(nodes)
                for reference in [self.keepers[node].append.remote(policy.digest, name, shared) for node in nodes]:
                    _get(reference)
        finished = {node: self.keepers[node].finish.remote(policy.digest) for node in nodes}
        for node, reference in finished.items():
            self.paths[node, policy.digest] = _get(reference)
            self.sent[node] += 1
            self._make_room(node)

    def _make_room(self, node: str) -> None:
        """Let a node drop the policies that were not used for the longest time."""
        own = [digest for at, digest in self.paths if at == node and digest not in self.staying]
        for digest in own[:-KEPT]:
            del self.paths[node, digest]
            _get(self.keepers[node].drop.remote(digest))


def files_of(folder: Path) -> list[Path]:
    """The top-level files of a policy's or model's folder, but for pickles, which nobody loads."""
    return sorted(
        file for file in folder.iterdir() if file.is_file() and not any(file.match(pattern) for pattern in PICKLES)
    )


def file_sizes(folder: Path) -> dict[str, int]:
    """Name -> bytes of `files_of`."""
    return {file.name: file.stat().st_size for file in files_of(folder)}


def pieces(file: Path) -> Iterator[tuple[str, bytes]]:
    """`file`'s name with `CHUNK` bytes after the other; once with none when it is empty."""
    with file.open("rb") as stream:
        data = stream.read(CHUNK)
        yield file.name, data
        while data := stream.read(CHUNK):
            yield file.name, data


def _at(policy: Policy, path: Path) -> Policy:
    return Policy(policy.id, path, policy.digest, policy.adapter, policy.probe)


def _get(reference: Any) -> Any:
    return wait(reference, EngineError, "a node's keeper of weights")


def _start_keeper(node: str) -> ActorHandle:
    strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    actor: ActorHandle = ray.remote(NodeKeeper).options(num_cpus=0, scheduling_strategy=strategy).remote()
    return actor


def _forget_dead() -> None:
    """Delete what keepers left behind whose process was killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        process = folder.name.removeprefix(PREFIX).partition("-")[0]
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
