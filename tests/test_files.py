"""Files that are whole or absent; digests that see every byte; removal that stays inside."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from online_dpo.files import digest, digest_json, link_tree, remove, sync_tree, write_json, write_text


class Dies(BaseException):
    """The process dies here."""


def test_write_text_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_text(file, "old")
    write_json(file, {"é": [1, None, 0.1], "line": "a\nb"})
    assert file.read_text(encoding="utf-8") == '{\n  "é": [\n    1,\n    null,\n    0.1\n  ],\n  "line": "a\\nb"\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_death_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    file = tmp_path / "a.json"
    write_text(file, "old")

    def die(*_: Any) -> None:
        raise Dies

    with monkeypatch.context() as patch:
        if step == "fsync":
            patch.setattr(os, "fsync", die)
        else:
            patch.setattr(Path, "replace", die)
        with pytest.raises(Dies):
            write_text(file, "new")
    assert file.read_text(encoding="utf-8") == "old"
    write_text(file, "newer")
    assert file.read_text(encoding="utf-8") == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_file_is_synced_before_its_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut may leave the new name on an empty file, or the old name."""
    order: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        real_sync(handle)

    def replace(self: Path, target: Path) -> Path:
        order.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_text(tmp_path / "a", "text")
    assert order == ["file", "rename", "folder"]


def test_nothing_that_json_lacks_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_sync_tree_syncs_every_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    for name in ("a", "sub/b", ".hidden"):
        (tmp_path / "tree" / name).write_text(name, encoding="utf-8")
    synced: set[str] = set()
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.add(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    sync_tree(tmp_path / "tree")
    assert synced == {"tree", "tree/a", "tree/sub", "tree/sub/b", "tree/.hidden"}


# --- digests ---


def test_digest_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_digest_of_a_folder_by_hand(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b").write_bytes(b"2")
    (tmp_path / "sub" / "a").write_bytes(b"1")
    one, two = hashlib.sha256(b"1").hexdigest(), hashlib.sha256(b"2").hexdigest()
    assert digest(tmp_path) == hashlib.sha256(f"b\0{two}\nsub/a\0{one}\n".encode()).hexdigest()


def tree(root: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.mark.parametrize(
    "other",
    [
        {"a": b"1", "b": b"3"},  # a byte
        {"a": b"1", "c": b"2"},  # a name
        {"a": b"2", "b": b"1"},  # swapped
        {"a": b"1"},  # one less
        {"a": b"1", "b": b"2", "c": b""},  # one more, empty
        {"a": b"1", "sub/b": b"2"},  # moved
        {"a": b"1", "b": b"2", ".b": b""},  # hidden
    ],
)
def test_digest_sees_every_change(tmp_path: Path, other: dict[str, bytes]) -> None:
    first = tree(tmp_path / "first", {"b": b"2", "a": b"1"})
    again = tree(tmp_path / "again", {"a": b"1", "b": b"2"})
    assert digest(first) == digest(again)
    assert digest(first) != digest(tree(tmp_path / "other", other))


def test_digest_json_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert digest_json({"a": 1, "b": [1, 2]}) == digest_json({"b": [1, 2], "a": 1})
    different = [{"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": None}, {"a": [1]}, {"b": 1}, {"a": True}, [], {}, "", "é"]
    assert len({digest_json(data) for data in different}) == len(different)


# --- removing and linking ---


def test_remove_takes_a_file_a_folder_or_nothing(tmp_path: Path) -> None:
    tree(tmp_path / "folder", {"a": b"1", "sub/b": b"2"})
    remove(tmp_path / "folder")
    (tmp_path / "file").write_bytes(b"")
    remove(tmp_path / "file")
    remove(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_remove_never_follows_a_link(tmp_path: Path) -> None:
    outside = tree(tmp_path / "outside", {"precious": b"1"})
    run = tmp_path / "run"
    run.mkdir()
    (run / "policy").symlink_to(outside)
    remove(run / "policy")
    tree(run / "other", {"a": b"1"})
    (run / "other" / "link").symlink_to(outside)
    remove(run / "other")
    assert (outside / "precious").read_bytes() == b"1"
    assert list(run.iterdir()) == []


def test_link_tree_shares_the_bytes(tmp_path: Path) -> None:
    first = tree(tmp_path / "first", {"a": b"1", "sub/b": b"2"})
    link_tree(first, tmp_path / "second")
    link_tree(first / "a", tmp_path / "third")
    assert digest(tmp_path / "second") == digest(first)
    assert (tmp_path / "second" / "sub" / "b").stat().st_ino == (first / "sub" / "b").stat().st_ino
    assert (tmp_path / "third").stat().st_ino == (first / "a").stat().st_ino


def test_link_tree_copies_where_links_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    first = tree(tmp_path / "first", {"a": b"1", "sub/b": b"2"})
    link_tree(first, tmp_path / "second")
    assert digest(tmp_path / "second") == digest(first)
    assert (tmp_path / "second" / "a").stat().st_ino != (first / "a").stat().st_ino
