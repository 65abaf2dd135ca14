"""`tidewright memory`: who has how much of a server's memory, and the KV cache's size while it runs."""

from __future__ import annotations

import json
import time

import click

from tidewright.launch import gateway_control, repository
from tidewright.launch.control import CONNECT_TIMEOUT, TroubleError, told
from tidewright.launch.errors import LaunchError
from tidewright.launch.model_command import decoder_at
from tidewright.served_models import FIRST_DECODER, decoder_of, further_name

POLL_INTERVAL = 0.2  # seconds


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Address of Triton's HTTP port.")
@click.option("--kv", metavar="SIZE", help="Give the KV cache so much: 512MiB, or 50% of what the budget pays for.")
@click.option(
    "--model", metavar="NAME", help="Of several models in one server, the one to ask; not needed for the first."
)
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=30.0, show_default=True, help="Seconds for --kv."
)
def memory(url: str, kv: str | None, model: str | None, timeout: float) -> None:
    """Show the memory of a server's model by owner, or resize its KV cache while requests run.

    The figures are those of one rank. The KV cache shrinks at most until one request of max_model_len fits in alone,
    and grows at most until the budget (memory_budget) is used up: without one, until its size at the start. Of that,
    LoRA adapters in memory keep what they have. Requests go on, and say the same; those for which there is no room left
    wait, and are computed anew. A gateway can't be asked, for each of its replicas has memory of its own.
    docs/memory.md has the rest.

    \b
    Examples:
      tidewright memory
      tidewright memory --kv 512MiB
      tidewright memory --kv 100%
    """
    try:
        url = gateway_control.base_url(url)
        if gateway_control.find(url, None, CONNECT_TIMEOUT):
            raise TroubleError(f"{url} is a gateway; memory is of one server: give its HTTP port (Triton's, 8000)")
        # The name in Triton is known from the metrics.
        decoder = FIRST_DECODER
        if model and model != FIRST_DECODER:
            decoder = decoder_of(further_name(model) or model)
        account = ask(url, decoder)
        if kv is not None:
            account = _resize(url, decoder, kv, account, timeout)
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
    for line in _report(account):
        click.echo(line)


def ask(url: str, model: str) -> dict[str, int]:
    """The fields of MemoryAccount. Raises LaunchError."""
    try:
        answer = told(url, "memory", CONNECT_TIMEOUT, model)
        return {str(name): int(value) for name, value in json.loads(answer).items()}
    except TroubleError as error:
        if repository.is_away(error):
            decoder_at(url, further_name(model) or model)
        raise repository.explained(error, url, model) from None
    except (ValueError, TypeError, AttributeError):
        raise TroubleError(f"{url} did not answer as a Tidewright model does") from None


def _resize(url: str, model: str, kv: str, account: dict[str, int], timeout: float) -> dict[str, int]:
    from tidewright.kv_cache.budget import mib, parse_memory

    try:
        size = parse_memory(kv, account["kv_most"])
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    least, most, block = account["kv_least"], account["kv_most"], account["block"]
    if not least <= size <= most:
        raise TroubleError(f"the KV cache can have {mib(least)} to {mib(most)}, not {mib(size)}")
    wanted = size // block * block
    told(url, f"resize:{size}", CONNECT_TIMEOUT, model)
    deadline = time.monotonic() + timeout
    while account["kv_target"] != wanted or _pool(account) != _reachable(account):
        if time.monotonic() > deadline:
            raise TroubleError(
                f"the KV cache has {mib(_pool(account))} after {timeout:g} s, not {mib(wanted)}: there may be no "
                "memory for it, see the server's log"
            )
        time.sleep(POLL_INTERVAL)
        account = ask(url, model)
    return account


def _reachable(account: dict[str, int]) -> int:
    """Bytes of the KV cache that was asked for, less what adapters have of them."""
    beside = account["budget"] - account["weights"] - account["workspace"] - account["adapters"]
    return min(account["kv_target"], beside // account["block"] * account["block"])


def _pool(account: dict[str, int]) -> int:
    return account["kv_used"] + account["kv_cached"] + account["kv_free"]


def _report(account: dict[str, int]) -> list[str]:
    from tidewright.kv_cache.budget import mib

    pool, fixed = _pool(account), account["weights"] + account["workspace"] + account["adapters"]
    share = (fixed + account["kv_used"]) / account["budget"] if account["budget"] else 0.0
    rows = [
        ("budget", account["budget"], f"{share:.0%} in use"),
        ("  weights", account["weights"], ""),
        ("  workspace", account["workspace"], "what the largest step takes"),
        ("  adapters", account["adapters"], ""),
        ("  KV cache", pool, f"{mib(account['kv_least'])} to {mib(account['kv_most'])}"),
        ("    in use", account["kv_used"], ""),
        ("    cached", account["kv_cached"], "free, and its content can still be found"),
        ("    free", account["kv_free"], ""),
    ]
    if account["kv_target"] != pool:
        why = "adapters have the rest" if pool == _reachable(account) else "as soon as there is memory"
        rows.append(("  KV cache, wanted", account["kv_target"], why))
    return [f"{name:<20}{mib(size):>14}  {remark}".rstrip() for name, size, remark in rows]
