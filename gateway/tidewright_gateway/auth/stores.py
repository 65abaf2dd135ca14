"""Where key entries are kept: a YAML file, or Redis (redis_keys.py). The gateway reads, `tidewright keys` writes."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import yaml

from tidewright_gateway.auth.errors import AuthSetupError
from tidewright_gateway.auth.keys import KeyEntry

_HEADER = """\
# API keys of Tidewright's gateway, made by `tidewright keys`, which keeps no comments: use `note`.
# What changes here is in force within a second. docs/keys.md says what an entry may have.
"""

Entries = dict[str, KeyEntry]
Change = Callable[[KeyEntry | None], KeyEntry | None]


def open_store(where: str) -> KeyStore:
    """`where` is the option `keys`. Reads nothing yet."""
    if where.startswith(("redis://", "rediss://")):
        from tidewright_gateway.auth.redis_keys import RedisStore  # slow to import

        return RedisStore(where)
    return FileStore(Path(where))


class KeyStore(ABC):
    """Blocks while it reads or writes; errors are AuthSetupError."""

    name: str
    """For messages; holds no password."""

    @abstractmethod
    def read(self) -> tuple[Entries, list[str]] | None:
        """All entries, and what is wrong with those left out; None if all is as at the last call."""

    @abstractmethod
    def change(self, key_id: str, change: Change) -> None:
        """Puts what `change` makes of the entry, None being no entry. Nobody else's change is lost."""


class FileStore(KeyStore):
    """A file with one fault is refused whole: which of its keys are meant can't be known."""

    def __init__(self, path: Path) -> None:
        self.name, self._path = str(path), path
        self._seen: tuple[int, ...] = ()
        self._fault: AuthSetupError | None = None

    def read(self) -> tuple[Entries, list[str]] | None:
        try:
            with self._path.open("rb") as file:
                # Before its content, so that what is written while it is read is seen the next time.
                seen = _signature(file)
                if seen == self._seen:
                    if self._fault:
                        raise self._fault
                    return None
                content = file.read()
        except FileNotFoundError:
            hint = f"`tidewright keys create ID --keys {self.name}` makes it"
            raise AuthSetupError(f"{self.name}: there is no such file; {hint}") from None
        except OSError as error:
            raise AuthSetupError(f"{self.name}: {error.strerror}") from None
        self._seen, self._fault = seen, None
        try:
            return _parse(content, self.name), []
        except AuthSetupError as error:
            self._fault = error
            raise

    def change(self, key_id: str, change: Change) -> None:
        path = self._path.resolve()  # a link to a file stays one
        try:
            with _locked(path.parent) as folder:
                status = path.stat() if path.exists() else None
                entries = _parse(path.read_bytes(), self.name) if status else {}
                if (entry := change(entries.pop(key_id, None))) is not None:
                    entries[key_id] = entry
                _replace(path, _text(entries), status)
                os.fsync(folder)  # a key that was revoked must not be back after a power failure
        except OSError as error:
            raise AuthSetupError(f"{self.name}: {error.strerror}") from None


def _signature(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _parse(content: bytes, name: str) -> Entries:
    try:
        root = yaml.compose(content, getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise AuthSetupError(f"{name}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    top = root.value if isinstance(root, yaml.MappingNode) else []
    if len(top) != 1 or top[0][0].value != "keys" or not isinstance(top[0][1], yaml.SequenceNode):
        raise AuthSetupError(f"{name}:1: must have `keys:` with a list of entries, and nothing else")

    entries: Entries = {}
    for node in top[0][1].value:
        try:
            entry = msgspec.convert(_plain(node), KeyEntry, strict=False)
            if entry.id in entries:
                raise _FaultError(node, f"there are two entries with the id {entry.id}")
        except msgspec.ValidationError as error:
            raise AuthSetupError(f"{name}:{_line(node, str(error))}: {error}") from None
        except _FaultError as error:
            raise AuthSetupError(f"{name}:{error.line}: {error}") from None
        entries[entry.id] = entry
    return entries


class _FaultError(Exception):
    def __init__(self, node: yaml.Node, message: str) -> None:
        super().__init__(message)
        self.line = node.start_mark.line + 1


def _plain(node: yaml.Node) -> Any:
    """All scalars as text, for YAML's own guesses (a date, 1_0, no) would be one more thing to know of."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        return node.value
    values: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _FaultError(key, "a field's name must be text")
        if key.value in values:
            raise _FaultError(key, f"{key.value} is there twice")
        values[key.value] = _plain(value)
    return values


def _line(node: yaml.Node, message: str = "") -> int:
    """Of what msgspec's message is about: it ends with a path such as `$.limits.concurrent`."""
    path = re.search(r"at `\$([^`]*)`$", message)
    names = re.findall(r"\w+", path[1]) if path else []
    if unknown := re.search(r"unknown field `([^`]*)`", message):
        names.append(unknown[1])
    for name in names:
        if isinstance(node, yaml.SequenceNode):
            node = node.value[int(name)]
        elif isinstance(node, yaml.MappingNode):
            key, value = next((pair for pair in node.value if pair[0].value == name), (node, node))
            node = value if isinstance(value, yaml.CollectionNode) and value.value else key
    return int(node.start_mark.line) + 1


def _text(entries: Entries) -> str:
    document = {"keys": [msgspec.to_builtins(entry) for entry in entries.values()]}
    # What is not ASCII is escaped: YAML takes some of it for the end of a line.
    return _HEADER + yaml.safe_dump(document, sort_keys=False)


def _replace(path: Path, text: str, before: os.stat_result | None) -> None:
    """At once: whoever reads sees the old file or the new one, and may read one who could read the other."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            if before and (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                _give(file.fileno(), before)
            os.fchmod(file.fileno(), before.st_mode & 0o777 if before else 0o600)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _give(descriptor: int, before: os.stat_result) -> None:
    try:
        os.fchown(descriptor, before.st_uid, before.st_gid)
    except PermissionError:
        owner = f"user {before.st_uid}, group {before.st_gid}"
        raise OSError(
            errno.EPERM, f"the file belongs to {owner}, and is to stay theirs: change it as that user"
        ) from None


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """One change at a time. The folder, whose descriptor this is, for the file itself is replaced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
