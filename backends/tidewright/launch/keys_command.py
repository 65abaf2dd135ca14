"""`tidewright keys`: makes, lists, renews and ends the gateway's API keys, in a file or in Redis."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from tidewright_gateway.auth.callers import Limits, Role

if TYPE_CHECKING:
    from tidewright_gateway.auth.keys import KeyEntry
    from tidewright_gateway.auth.stores import KeyStore

_STORE = click.option(
    "--keys",
    "where",
    envvar="TIDEWRIGHT_GATEWAY_KEYS",
    required=True,
    metavar="FILE|REDIS",
    help="Where the keys are kept, as the gateway's option keys: a YAML file, or redis://HOST:PORT/DB.",
)
_WIDE = 10_000  # columns: other programs search and cut whole lines
_ID = click.argument("key_id", metavar="ID")
_LIMITS = {
    "requests_per_second": (click.FloatRange(0, min_open=True), "Requests per second"),
    "concurrent": (click.IntRange(1), "Requests that run or wait at one time"),
    "tokens_per_minute": (click.IntRange(1), "Tokens of prompts and answers per minute"),
    "tokens_per_day": (click.IntRange(1), "Tokens of prompts and answers per day"),
}


def _limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for prefix, whose in (("user_", "of each user that its requests name"), ("", "of all requests with this key")):
        for name, (kind, meaning) in reversed(_LIMITS.items()):
            flag = f"--{prefix}{name}".replace("_", "-")
            command = click.option(flag, type=kind, help=f"{meaning}, {whose}. Unset: no limit.")(command)
    return command


class _Moment(click.ParamType):
    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Aware and in the future."""
        now = datetime.now(timezone.utc)
        try:
            if match := re.fullmatch(r"(\d{1,5})d", value):
                moment = now + timedelta(days=int(match[1]))
            else:
                moment = datetime.fromisoformat(re.sub("Z$", "+00:00", value))
                moment = moment.replace(tzinfo=moment.tzinfo or timezone.utc)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no time such as 2027-01-31, 2027-01-31T12:00:00Z or 90d", param, ctx)
        if moment <= now:
            self.fail(f"{value!r} is over already", param, ctx)
        return moment.replace(microsecond=0)


@click.group()
def keys() -> None:
    """Make, list, renew and end the API keys of the gateway.

    The gateway asks for keys when it has the option keys, and sees within a second what is changed here. Only hashes
    are kept: a key is shown once, when it is made.

    \b
    Examples:
      tidewright keys create alice --keys keys.yaml --tokens-per-minute 60000
      tidewright gateway --keys keys.yaml --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
      tidewright keys list --keys redis://127.0.0.1:6379/0
    """


@keys.command()
@_ID
@_STORE
@click.option(
    "--role",
    type=click.Choice([role.value for role in Role]),
    default=Role.USE.value,
    show_default=True,
    help="admin may use the admin endpoints as well.",
)
@click.option(
    "--priority",
    type=int,
    default=0,
    show_default=True,
    help="Added to that of each request, which is 0 to 1000 (an admin's from -1000); lower runs first. "
    "From -1000000 to 1000000: 1001 or more is behind all requests of keys with 0.",
)
@click.option(
    "--weight", type=int, default=1, show_default=True, help="Share of service beside other keys, from 1 to 1000."
)
@click.option("--expires", type=_Moment(), help="When it ends: 2027-01-31 (0:00 UTC), 2027-01-31T12:00:00Z, or 90d.")
@click.option("--note", default="", help="Whatever helps to know the key; shown by list.")
@_limit_options
def create(key_id: str, where: str, **values: Any) -> None:
    """Make a key named ID and print it: the only time that it is shown.

    ID is 1 to 64 letters, digits, dots, hyphens and underscores; logs name the key by it. A file that is not there
    yet is made, for its owner only.

    \b
    Examples:
      tidewright keys create alice --keys keys.yaml
      tidewright keys create ops --keys keys.yaml --role admin --expires 90d
      tidewright keys create app --keys keys.yaml --requests-per-second 20 --user-tokens-per-day 100000
    """
    with _store(where) as store:
        from tidewright_gateway.auth.keys import KeyEntry, make_key

        for field, prefix in (("limits", ""), ("user_limits", "user_")):
            given = {name: values.pop(prefix + name) for name in _LIMITS}
            if limits := {name: value for name, value in given.items() if value is not None}:
                values[field] = limits
        key, text = make_key(key_id)
        try:
            entry = msgspec.convert({"id": key_id, "hashes": [text], **values}, KeyEntry)
        except msgspec.ValidationError as error:
            raise click.ClickException(str(error)) from None

        def put(old: KeyEntry | None) -> KeyEntry:
            if old:
                raise click.ClickException(f"there is a key {key_id} already; rotate it, revoke it, or choose another")
            return entry

        store.change(key_id, put)
    _show(key)


@keys.command("list")
@_STORE
def list_keys(where: str) -> None:
    """Show all keys, without anything secret."""
    with _store(where) as store:
        entries, faults = store.read() or ({}, [])
    table = Table(
        "id", "role", "state", "secrets", "expires", "priority", "weight", "limits", "per user", "note", box=None
    )
    for entry in sorted(entries.values(), key=lambda entry: entry.id):
        table.add_row(
            entry.id,
            entry.role.value,
            "to be rotated"
            if entry.is_outdated
            else "disabled"
            if entry.disabled
            else "expired"
            if entry.trouble
            else "good",
            "new and old" if len(entry.hashes) > 1 else "one",
            entry.expires.isoformat() if entry.expires else "never",
            str(entry.priority),
            str(entry.weight),
            _shown(entry.limits),
            _shown(entry.user_limits),
            entry.note,
        )
    Console(markup=False, highlight=False, width=_WIDE).print(table)
    for fault in faults:
        click.echo(f"Broken and refused: {fault}", err=True)


@keys.command()
@_ID
@_STORE
@click.option("--now", is_flag=True, help="End the old secret at once, such as one that has leaked.")
def rotate(key_id: str, where: str, now: bool) -> None:
    """Give the key ID a new secret, and print it.

    The old one works on, beside the new one, until `tidewright keys revoke ID --old` or the next rotation.
    Role, limits and the rest stay as they are.

    \b
    Examples:
      tidewright keys rotate alice --keys keys.yaml
      tidewright keys rotate alice --keys keys.yaml --now
    """
    with _store(where) as store:
        from tidewright_gateway.auth.keys import make_key

        key, text = make_key(key_id)

        def renew(old: KeyEntry | None) -> KeyEntry:
            old = _existing(old, key_id)
            return msgspec.structs.replace(old, hashes=(text,) if now or old.is_outdated else (text, old.hashes[0]))

        store.change(key_id, renew)
    _show(key)


@keys.command()
@_ID
@_STORE
@click.option("--old", is_flag=True, help="End only the secret from before the last rotation.")
def revoke(key_id: str, where: str, old: bool) -> None:
    """End the key ID: its entry goes, and within a second the gateway refuses it.

    \b
    Examples:
      tidewright keys revoke alice --keys keys.yaml
      tidewright keys revoke alice --keys keys.yaml --old
    """

    def end(entry: KeyEntry | None) -> KeyEntry | None:
        entry = _existing(entry, key_id)
        if old and len(entry.hashes) == 1:
            raise click.ClickException(f"{key_id} has no old secret; without --old, its only one is revoked")
        return msgspec.structs.replace(entry, hashes=entry.hashes[:1]) if old else None

    with _store(where) as store:
        store.change(key_id, end)
    click.echo(f"The old secret of {key_id} is revoked." if old else f"{key_id} is revoked.", err=True)


@contextmanager
def _store(where: str) -> Iterator[KeyStore]:
    """Its errors are click's."""
    try:
        from tidewright_gateway.auth.errors import AuthSetupError
        from tidewright_gateway.auth.stores import open_store
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is missing: pip install 'tidewright[gateway]'") from None
    try:
        yield open_store(where)
    except AuthSetupError as error:
        raise click.ClickException(str(error)) from None


def _existing(entry: KeyEntry | None, key_id: str) -> KeyEntry:
    if entry is None:
        raise click.ClickException(f"there is no key {key_id}; `tidewright keys list` shows those there are")
    return entry


def _shown(limits: Limits) -> str:
    """Only those that are set."""
    return " ".join(f"{name}={value:g}" for name, value in msgspec.to_builtins(limits).items()) or "none"


def _show(key: str) -> None:
    click.echo(key)
    click.echo("Keep it: it can't be shown again.", err=True)
