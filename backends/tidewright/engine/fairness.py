"""Who waits, and whose turn it is: tenants get service in proportion to their weights. Pure; the same on every rank.

The Virtual Token Counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): a tenant's counter
grows by the cost of what is computed for it, divided by its weight, and the waiting tenant with the lowest counter is
next. A tenant that begins to wait is lifted to the lowest counter of those that do, so idle time earns no credit, or
to the virtual time, which grows by what is computed divided by the weights of all (as in WF2Q+: Bennett and Zhang,
1997), so that ever new tenants keep nobody waiting. An idle tenant whose counter is not above that time can be
forgotten: state is bounded by the work, not by the names.

Each priority is a class with counters of its own; a more urgent class goes first.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter

from tidewright.engine.sequence import Sequence
from tidewright.schema import SamplingParams

UNIT = 720_720  # of a counter, for one token at weight 1; integers, and without a rest for weights up to 16
CLAIM = 1024 * UNIT
"""By so much the counter of a tenant that begins seems lower, until it has grown by that, where the prompts of those
that run are put in order: else it would share the steps of its first prompt, which would take twice as long as alone.
"""
MOST_DEBTORS = 4096  # tenants of a class that are remembered while they are idle, because they are ahead of others

_arrival = attrgetter("order")


class Account:
    """A tenant in one class."""

    __slots__ = (
        "claims_until",
        "counter",
        "its_class",
        "place",
        "queued",
        "rank",
        "running",
        "tenant",
        "unit",
        "waiting",
        "weight",
    )

    def __init__(self, tenant: str, counter: int, its_class: _Class) -> None:
        self.tenant, self.weight, self.unit, self.its_class = tenant, 1, UNIT, its_class
        self.counter = self.rank = counter  # `rank`: as it was when the step began that is planned
        self.place = its_class.priority, counter  # in the order of those that run: its rank, less `CLAIM` if it has one
        self.claims_until = counter  # a rank
        self.waiting: list[Sequence] = []  # by arrival
        self.running = 0
        self.queued: tuple[int, bool, int, Account] | None = None  # its entry in the heap of the class: others are old

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def claims(self) -> bool:
        return self.place[1] < self.rank

    def stand(self, rank: int) -> None:
        """Where it is while the next step is planned."""
        self.rank = rank
        self.place = self.its_class.priority, rank - CLAIM if rank < self.claims_until else rank

    def begin(self, time: int) -> None:
        """Its tenant has a request again, at that virtual time. Who is ahead has had more than its share already."""
        self.claims_until = time + CLAIM if self.counter <= time else self.counter

    def lift(self, time: int) -> None:
        """Nobody's idle time counts: neither of those that come back, nor of those that only ran."""
        self.counter = max(self.counter, time)
        self.stand(max(self.rank, time))

    @property
    def turn(self) -> tuple[int, bool, int, Account]:
        """Lower goes first. Of equal counters, who has nothing yet, then who has waited for longest."""
        return self.counter, self.running > 0, self.waiting[0].order[1], self


@dataclass
class _Ahead:
    """A tenant's turns, played out."""

    counter: int
    waiting: list[Sequence]
    weight: int
    runs: bool
    taken: int = 0


class _Class:
    """The requests of one priority."""

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.accounts: dict[str, Account] = {}
        self.num_waiting = self.num_active = 0
        self.charged: list[Account] = []  # in the step that is planned
        self._time = 0  # virtual: where a tenant begins that comes back
        self._weights = 0  # of all that wait or run
        # Both are lazy: what an entry says may be out of date, but never too high.
        self._turns: list[tuple[int, bool, int, Account]] = []
        self._debtors: list[tuple[int, str]] = []

    def enqueue(self, sequence: Sequence, is_new: bool) -> None:
        tenant = sequence.sampling.tenant
        account = self.accounts.get(tenant)
        if account is None:
            account = self.accounts[tenant] = Account(tenant, self._time, self)
        weight = sequence.sampling.tenant_weight
        begins = account.is_idle
        self.num_active += begins
        self._weights += weight - (0 if begins else account.weight)
        if not account.waiting:
            self._time = self._now()
            if begins and is_new:
                account.begin(self._time)
            account.lift(self._time)
        account.weight, account.unit = weight, UNIT // weight
        sequence.account = account
        insort(account.waiting, sequence, key=_arrival)
        self.num_waiting += 1
        self._queue(account)

    def _now(self) -> int:
        """The virtual time at which a tenant that comes begins."""
        least = self.first()
        return max(self._time, least.account.rank if least else 0)

    def first(self) -> Sequence | None:
        """Depends on who waits, and not on when this was last asked: ranks ask at different times."""
        turns = self._turns
        while turns:
            entry, account = turns[0], turns[0][3]
            if entry is not account.queued:
                heapq.heappop(turns)
            elif not account.waiting:
                heapq.heappop(turns)
                account.queued = None
            elif entry != account.turn:
                account.queued = account.turn
                heapq.heapreplace(turns, account.queued)
            else:
                return account.waiting[0]
        return None

    def _queue(self, account: Account) -> None:
        """It may have an earlier turn than before: one waits that came earlier, or fewer run."""
        if not account.waiting or (account.queued and account.queued <= account.turn):
            return
        account.queued = account.turn
        heapq.heappush(self._turns, account.queued)
        if len(self._turns) > 2 * len(self.accounts) + 16:  # most entries are old, or of tenants that are forgotten
            for entry in self._turns:
                entry[3].queued = None
            self._turns = []
            for each in self.accounts.values():
                if each.waiting:
                    each.queued = each.turn
                    self._turns.append(each.queued)
            heapq.heapify(self._turns)

    def standing(self, tenant: str, weight: int) -> Account:
        """The account that a new request would have, as `enqueue` makes it."""
        known = self.accounts.get(tenant)
        if known and not known.is_idle:
            return known
        now = self._now()
        account = Account(tenant, known.counter if known else now, self)
        account.weight = weight
        account.begin(now)
        account.lift(now)
        return account

    def ahead(self, tenant: str, weight: int, cost: Callable[[Sequence], int]) -> list[Sequence]:
        """Those that get their turn before a new request of `tenant`, in order, if each costs `cost`."""
        found: list[Sequence] = []
        queued = [account for account in self.accounts.values() if account.waiting]
        least = min((account.counter for account in queued), default=self._time)
        known = self.accounts.get(tenant)
        own = _Ahead(
            known.counter if known else 0, known.waiting if known else [], weight, bool(known and known.running)
        )
        if not own.waiting:
            own.counter = max(own.counter, least, self._time)
        turns = [
            _Ahead(each.counter, each.waiting, each.weight, each.running > 0) for each in queued if each is not known
        ]
        # As `turn` has them: of equal counters, who has nothing yet.
        heap = [(each.counter, each.runs, number, each) for number, each in enumerate([*turns, own])]
        heapq.heapify(heap)
        while heap:
            _, _, number, each = heap[0]
            if each.taken == len(each.waiting):  # its own requests are all served: it is the new one's turn
                break
            sequence = each.waiting[each.taken]
            found.append(sequence)
            each.taken += 1
            each.counter += cost(sequence) * UNIT // each.weight
            if each is not own and each.taken == len(each.waiting):
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (each.counter, True, number, each))
        return found

    def leave_queue(self, sequence: Sequence) -> None:
        sequence.account.waiting.remove(sequence)
        self.num_waiting -= 1
        self._settle(sequence.account)

    def begin(self, sequence: Sequence) -> None:
        """One of those that wait runs: the first, or one behind those that wait for a LoRA adapter's slot."""
        account, first = sequence.account, self.first()
        assert first
        account.waiting.remove(sequence)
        self.num_waiting -= 1
        account.running += 1
        self._time = max(self._time, first.account.rank)
        self._forget()

    def end_step(self) -> None:
        """A step is planned: a tenant that comes from now on has missed it.

        But it does not begin behind all who were charged: once those that are ahead have left, nobody is owed anything.
        """
        if not self.charged:
            return
        cost = highest = 0
        for account in self.charged:
            cost += (account.counter - account.rank) * account.weight
            highest = max(highest, account.counter)
            account.stand(account.counter)
        self._time = max(self._time, min(self._time + cost // max(self._weights, 1), highest))
        self.charged.clear()

    def leave(self, sequence: Sequence) -> None:
        """It ran, and does not any more."""
        sequence.account.running -= 1
        self._queue(sequence.account)
        self._settle(sequence.account)

    def _settle(self, account: Account) -> None:
        if account.is_idle:
            self.num_active -= 1
            self._weights -= account.weight
            heapq.heappush(self._debtors, (account.counter, account.tenant))
            self._forget()

    def _forget(self) -> None:
        """Drops the tenants that would begin anew with the counter that they have, or with more."""
        debtors = self._debtors
        while debtors and (debtors[0][0] <= self._time or len(debtors) > MOST_DEBTORS):
            counter, tenant = heapq.heappop(debtors)
            account = self.accounts.get(tenant)
            if account and account.is_idle and account.counter == counter:
                del self.accounts[tenant]


class FairQueue:
    """All that wait, and the accounts of those that run."""

    def __init__(self) -> None:
        self._classes: dict[int, _Class] = {}
        self._requests: dict[str, int] = {}  # by tenant: that wait or run

    def __len__(self) -> int:
        return sum(each.num_waiting for each in self._classes.values())

    @property
    def is_shared(self) -> bool:
        """There is more than one tenant in a class."""
        return any(len(each.accounts) > 1 for each in self._classes.values())

    @property
    def num_accounts(self) -> int:
        return sum(len(each.accounts) for each in self._classes.values())

    def is_behind(self, tenant: str) -> bool:
        """Whether one of its requests waits, and not only for the next step."""
        accounts = (each.accounts.get(tenant) for each in self._classes.values())
        return any(account and account.waiting and not account.claims for account in accounts)

    def requests(self, tenant: str) -> int:
        """That wait or run, in all classes."""
        return self._requests.get(tenant, 0)

    def add(self, sequence: Sequence) -> None:
        """A new request."""
        tenant = sequence.sampling.tenant
        self._requests[tenant] = self._requests.get(tenant, 0) + 1
        self._enqueue(sequence, is_new=True)

    def end_step(self) -> None:
        """A step is planned: ranks, which don't change meanwhile, are what counters are now."""
        for each in self._classes.values():
            each.end_step()

    def first(self) -> Sequence | None:
        """Whose turn it is."""
        for priority in sorted(self._classes):
            if sequence := self._classes[priority].first():
                return sequence
        return None

    def ahead(self, new: SamplingParams, cost: Callable[[Sequence], int]) -> list[Sequence]:
        """Those that wait and get their turn before a new request, in order, if each costs `cost` tokens."""
        found: list[Sequence] = []
        for priority in sorted(self._classes):
            each = self._classes[priority]
            if priority < new.priority:
                found += [sequence for account in each.accounts.values() for sequence in account.waiting]
            elif priority == new.priority:
                found += each.ahead(new.tenant, new.tenant_weight, cost)
        return found

    def standing(self, new: SamplingParams) -> Account:
        """Where a new request would stand: its tenant's account, or one such as it would get."""
        its_class = self._classes.get(new.priority) or _Class(new.priority)
        return its_class.standing(new.tenant, new.tenant_weight)

    def in_order(self) -> Iterator[Sequence]:
        """All that wait, as if nothing were computed meanwhile. Sorts: for when it is not the first one's turn."""
        for priority in sorted(self._classes):
            accounts = [account for account in self._classes[priority].accounts.values() if account.waiting]
            for account in sorted(accounts, key=lambda account: account.turn[:3]):
                yield from account.waiting

    def begin(self, sequence: Sequence) -> None:
        """It runs: `first()`, or one of `in_order()`, if those before it wait for something else."""
        self._classes[sequence.order[0]].begin(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """It ran, and waits again."""
        account = sequence.account
        account.running -= 1
        if account.is_idle:
            account.its_class.num_active -= 1
            account.its_class._weights -= account.weight
        self._enqueue(sequence, is_new=False)

    def end(self, sequence: Sequence, ran: bool) -> None:
        tenant, priority = sequence.sampling.tenant, sequence.order[0]
        its_class = self._classes[priority]
        (its_class.leave if ran else its_class.leave_queue)(sequence)
        if not its_class.num_active:
            del self._classes[priority]  # nobody has waited for what was used: all begin anew
        self._requests[tenant] -= 1
        if not self._requests[tenant]:
            del self._requests[tenant]

    def charge(self, sequences: Iterable[Sequence], draws: bool) -> None:
        """Of what is computed of them now, what was not before; a token that each draws counts as one more.

        So a generated token costs two of a prompt, as in the paper. What the cache has, and what is computed again
        (after a preemption, or a step that was taken back), costs nothing.
        """
        for sequence in sequences:
            cost = sequence.num_computed - sequence.num_charged
            if cost <= 0:
                continue
            sequence.num_charged = sequence.num_computed
            account = sequence.account
            if account.counter == account.rank:
                account.its_class.charged.append(account)
            account.counter += (cost + draws) * account.unit

    def _enqueue(self, sequence: Sequence, is_new: bool) -> None:
        priority = sequence.order[0]
        if priority not in self._classes:
            self._classes[priority] = _Class(priority)
        self._classes[priority].enqueue(sequence, is_new)


def goes_before(sequence: Sequence, running: Sequence) -> bool:
    """Whether one that waits gets its tokens and its blocks before one that runs."""
    account, other = sequence.account, running.account
    if account is other:
        return False  # first come, first served
    return account.place < other.place or (account.place == other.place and not account.running)


fair_order = attrgetter("account.place", "order")
"""Of those that run."""
