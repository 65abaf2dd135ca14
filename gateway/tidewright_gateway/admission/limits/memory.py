"""Accounts in this process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from tidewright_gateway.admission.limits.buckets import Account
from tidewright_gateway.admission.limits.store import Refusal, Settle, Subject, Take, TakeResult

SWEEP_AT = 1024  # accounts; then and at each doubling, those that nobody uses are forgotten


class MemoryStore:
    trouble = ""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock`: seconds since 1970 (UTC), for days end by it."""
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self._sweep_at = SWEEP_AT

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def take(self, take: Take) -> TakeResult:
        now = self._clock()
        accounts = [self._account(subject, now) for subject in take.subjects]
        refusals = [
            (*refused, index)
            for index, account in enumerate(accounts)
            if (refused := account.refuses(take.id, take.cost))
        ]
        refusal: Refusal | None = None
        if refusals:
            wait, limit, index = max(refusals, key=lambda refused: refused[0])
            refusal = Refusal(index, limit, wait if math.isfinite(wait) else None)
        else:
            for account in accounts:
                account.hold(take.id, take.cost)
        return TakeResult(now, [account.usage for account in accounts], refusal)

    async def settle(self, settle: Settle) -> None:
        now = self._clock()
        for subject in settle.subjects:
            self._account(subject, now).settle(settle.id, settle.used)

    def _account(self, subject: Subject, now: float) -> Account:
        """As it is now."""
        account = self._accounts.get(subject.name)
        if account is None:
            if len(self._accounts) >= self._sweep_at:
                self._sweep(now)
            account = self._accounts[subject.name] = Account(subject.limits, now)
        account.advance(now, subject.limits)
        return account

    def _sweep(self, now: float) -> None:
        for account in self._accounts.values():
            account.advance(now)
        self._accounts = {name: account for name, account in self._accounts.items() if not account.idle}
        self._sweep_at = max(SWEEP_AT, 2 * len(self._accounts))
