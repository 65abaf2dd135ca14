"""The file that keeps keys: what is refused in it, and that what is written is read as it was meant."""

from __future__ import annotations

import os
from datetime import timezone
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tidewright_gateway.auth import Authenticator, AuthSetupError
from tidewright_gateway.auth.callers import Limits, Role
from tidewright_gateway.auth.keys import KeyEntry, make_key, split_key
from tidewright_gateway.auth.stores import FileStore
from tidewright_gateway.config import GatewaySettings

HASH = make_key("x")[1]
QUOTED = f"'{HASH}'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: must have `keys:`"),
        ("[]", ":1: must have `keys:`"),
        ("keys: {}", ":1: must have `keys:`"),
        ("keys: []\nkeys: []", ":1: must have `keys:`"),
        ("keys:\n- id: [}", ":2: not YAML"),
        ("keys:\n- \x00", "not YAML"),
        ("keys:\n- alice", ":2: Expected `object`"),
        ("keys:\n- id: alice", ":2: .*missing required field `hashes`"),
        (f"keys:\n- id: a b\n  hashes: [{QUOTED}]", ":2: 'a b' can't be an id"),
        (f"keys:\n- id: anonymous\n  hashes: [{QUOTED}]", ":2: the id anonymous is taken"),
        ("keys:\n- id: alice\n  hashes:\n  - plain", ":2: one of the hashes is no sha256"),
        ("keys:\n- id: alice\n  hashes: []", ":3: .*length >= 1"),
        (f"keys:\n- id: alice\n  hashes: [{QUOTED}]\n  rolle: use", ":4: .*unknown field `rolle`"),
        (f"keys:\n- id: alice\n  hashes: [{QUOTED}]\n  role: root", ":4: Invalid enum value 'root'"),
        (f"keys:\n- id: alice\n  hashes: [{QUOTED}]\n  limits:\n    concurrent: -1", ":5: Expected `int` >= 1"),
        (f"keys:\n- id: alice\n  hashes: [{QUOTED}]\n  limits: {{a: 1}}", ":4: .*unknown field `a`"),
        (f"keys:\n- id: alice\n  hashes: [{QUOTED}]\n  expires: 2027-01-31T00:00:00", ":4: .*timezone"),
        (
            f"keys:\n- id: alice\n  hashes: [{QUOTED}]\n  disabled: true\n  disabled: false",
            ":5: disabled is there twice",
        ),
        (f"keys:\n- id: alice\n  hashes: [{QUOTED}]\n- id: alice\n  hashes: [{QUOTED}]", ":4: there are two entries"),
    ],
)
def test_a_broken_file_is_refused_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(AuthSetupError, match=f"^{path}.*{message}"):
        Authenticator(GatewaySettings(keys=str(path)))


def test_a_missing_file_and_a_missing_redis_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(AuthSetupError, match="no such file; `tidewright keys create ID"):
        Authenticator(GatewaySettings(keys=str(tmp_path / "keys.yaml")))
    with pytest.raises(AuthSetupError, match=r"^redis://127\.0\.0\.1:1/0: .*refused"):
        Authenticator(GatewaySettings(keys="redis://me:password@127.0.0.1:1/0"))


def test_a_file_is_for_its_owner_until_that_is_changed_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path, link = tmp_path / "keys.yaml", tmp_path / "link.yaml"
    link.symlink_to(path)
    FileStore(link).change("alice", lambda _: KeyEntry("alice", (HASH,)))
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    FileStore(link).change("bob", lambda _: KeyEntry("bob", (HASH,)))
    assert path.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink()
    assert set(tmp_path.iterdir()) == {path, link}


def test_a_file_of_somebody_else_stays_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if root changed the keys of a gateway that runs as another user, which has to read them."""
    path = tmp_path / "keys.yaml"
    FileStore(path).change("alice", lambda _: KeyEntry("alice", (HASH,)))
    owner, given = path.stat(), list[tuple[int, int]]()
    monkeypatch.setattr(os, "geteuid", lambda: owner.st_uid + 1)
    monkeypatch.setattr(os, "fchown", lambda _, *who: given.append(who))
    FileStore(path).change("bob", lambda _: KeyEntry("bob", (HASH,)))
    assert given == [(owner.st_uid, owner.st_gid)]

    def refuse(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "fchown", refuse)
    with pytest.raises(AuthSetupError, match=f"the file belongs to user {owner.st_uid}, .*: change it as that user"):
        FileStore(path).change("carl", lambda _: KeyEntry("carl", (HASH,)))
    entries, _ = FileStore(path).read() or ({}, [])
    assert set(entries) == {"alice", "bob"}
    assert set(tmp_path.iterdir()) == {path}


IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
LIMITS = st.builds(
    Limits,
    requests_per_second=st.none() | st.floats(1e-9, 1e9),
    concurrent=st.none() | st.integers(1, 2**60),
    tokens_per_day=st.none() | st.integers(1, 2**60),
)
ENTRIES = st.builds(
    KeyEntry,
    id=IDS.filter(lambda text: text != "anonymous"),
    hashes=st.just((HASH,)) | st.just((HASH, HASH)),
    role=st.sampled_from(Role),
    limits=LIMITS,
    user_limits=LIMITS,
    priority=st.integers(-(10**6), 10**6),
    weight=st.integers(1, 1000),
    expires=st.none() | st.datetimes(timezones=st.just(timezone.utc)),
    disabled=st.booleans(),
    note=st.text(),
)


@settings(max_examples=25, deadline=None)
@example(entry=KeyEntry("a", (HASH,), note="\x85"))
@given(entry=ENTRIES)
def test_every_entry_is_read_as_it_was_written(entry: KeyEntry, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    FileStore(path).change(entry.id, lambda _: entry)
    assert FileStore(path).read() == ({entry.id: entry}, [])


@settings(deadline=None)
@given(key_id=IDS, secret=st.from_regex(r"[A-Za-z0-9_-]{43}", fullmatch=True))
def test_id_and_secret_are_told_apart_whatever_hyphens_they_have(key_id: str, secret: str) -> None:
    assert split_key(f"tw-{key_id}-{secret}") == (key_id, secret)
