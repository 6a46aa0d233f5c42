"""Which calls go into the next forward pass: the policy alone, without threads, tensors or a clock of its own.

Calls with equal keys can share one forward pass. A key is served once all its members have returned from their last
pass, so that batches stay full, or once the time to wait for the missing ones is over. Keys take turns by surplus round
robin (Adiseshu, Parulkar, Varghese, SIGCOMM 1996): each turn credits a key with time in proportion to its waiting
members, each pass is deducted, and a key in debt is skipped. So requests share the device's time evenly, whatever their
models cost, and between two services of a key the other keys get at most the time that `wait_bound` gives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

QUANTUM_S = 0.05
"""Device time in seconds that one member earns its key in one round."""

GUARD_S = 0.05
"""How long, in seconds, a key waits at least for missing members; half the duration of a pass if that is more."""

Member = TypeVar("Member", bound=Hashable)


@dataclass(eq=False)
class Call(Generic[Member]):
    """One call of a network by `member`, of `rows` samples along the batch axis."""

    member: Member
    key: Hashable
    rows: int


@dataclass(frozen=True)
class Batch(Generic[Member]):
    """Calls to run as one forward pass."""

    key: Hashable
    calls: tuple[Call[Member], ...]


@dataclass
class _KeyQueue(Generic[Member]):
    """The members and waiting calls of one key."""

    waiting: deque[Call[Member]] = field(default_factory=deque)
    away: set[Member] = field(default_factory=set)
    rows: int = 1
    credit_s: float = 0.0
    cost_s: float = 0.0
    patience_until: float | None = None


class Batcher(Generic[Member]):
    """The waiting calls. `limit` gives the most rows that one pass of a key may have.

    The caller reports events in order by `add`, `leave`, `begin` and `ran`, and asks `next` what to run. Not
    thread-safe.
    """

    def __init__(self, limit: Callable[[Hashable], int]) -> None:
        self._limit = limit
        self._queues: dict[Hashable, _KeyQueue[Member]] = {}
        self._ring: deque[Hashable] = deque()
        self._home: dict[Member, Hashable] = {}
        self._debts: dict[Hashable, float] = {}

    def add(self, call: Call[Member]) -> None:
        """A member waits for a pass; it is no longer expected where it was before."""
        queue = self._queues.get(call.key)
        if queue is None:
            queue = self._queues[call.key] = _KeyQueue(credit_s=self._debts.pop(call.key, 0.0))
            self._ring.append(call.key)
        queue.waiting.append(call)
        queue.rows = call.rows
        self._come_back(call.member)

    def leave(self, member: Member, call: Call[Member] | None = None) -> None:
        """A member makes no further call for now; with `call`, that one is withdrawn if it still waits."""
        self._come_back(member)
        if call is not None and (queue := self._queues.get(call.key)) and call in queue.waiting:
            queue.waiting.remove(call)
            self._drop_empty(call.key)

    def next(self, now: float) -> Batch[Member] | float | None:
        """The batch to run; or for how many seconds to wait for events; or None, to wait until the next event."""
        if not any(queue.waiting for queue in self._queues.values()):
            return None
        while True:
            key = self._ring[0]
            queue = self._queues[key]
            if queue.credit_s <= 0:
                # If no other key has calls, this loop just pays the debt off.
                queue.credit_s += QUANTUM_S * max(1, len(queue.waiting) + len(queue.away))
                self._ring.rotate(-1)
                continue
            if queue.away and self._rows(queue) < self._limit(key):
                if queue.patience_until is None:
                    queue.patience_until = now + max(GUARD_S, queue.cost_s / 2)
                if now < queue.patience_until:
                    return queue.patience_until - now
                self._give_up(queue)
            if queue.waiting:
                return Batch(key, self._chosen(key, queue))
            self._drop_empty(key)

    def begin(self, batch: Batch[Member]) -> None:
        """`batch` goes to the device: its calls no longer wait."""
        queue = self._queues[batch.key]
        for call in batch.calls:
            queue.waiting.remove(call)
            queue.away.add(call.member)
            self._home[call.member] = batch.key

    def ran(self, batch: Batch[Member], seconds: float) -> None:
        """The pass took so long; its members are expected back soon."""
        queue = self._queues.get(batch.key)
        if queue is None:
            return
        queue.cost_s = seconds if queue.cost_s == 0 else 0.7 * queue.cost_s + 0.3 * seconds
        queue.credit_s -= seconds
        queue.patience_until = None
        self._drop_empty(batch.key)

    def forget(self, key: Hashable) -> None:
        """No more calls of this key will come; its debt is dropped."""
        self._debts.pop(key, None)

    def active(self) -> dict[Hashable, int]:
        """The keys with members, and the rows of the latest call of each."""
        return {key: queue.rows for key, queue in self._queues.items()}

    def _chosen(self, key: Hashable, queue: _KeyQueue[Member]) -> tuple[Call[Member], ...]:
        calls: list[Call[Member]] = []
        rows, most = 0, self._limit(key)
        for call in queue.waiting:
            if calls and rows + call.rows > most:
                break
            calls.append(call)
            rows += call.rows
        return tuple(calls)

    @staticmethod
    def _rows(queue: _KeyQueue[Member]) -> int:
        return sum(call.rows for call in queue.waiting)

    def _come_back(self, member: Member) -> None:
        key = self._home.pop(member, None)
        queue = self._queues.get(key) if key is not None else None
        if queue is not None and key is not None:
            queue.away.discard(member)
            self._drop_empty(key)

    def _give_up(self, queue: _KeyQueue[Member]) -> None:
        for member in queue.away:
            self._home.pop(member, None)
        queue.away.clear()
        queue.patience_until = None

    def _drop_empty(self, key: Hashable) -> None:
        queue = self._queues[key]
        if not queue.waiting and not queue.away:
            del self._queues[key]
            self._ring.remove(key)
            # Members that switch between keys must not lose their debts by that; once all are gone, no debts remain.
            if not self._queues:
                self._debts.clear()
            elif queue.credit_s < 0:
                self._debts[key] = queue.credit_s


def wait_bound(own_s: float, others: Iterable[tuple[int, float]]) -> float:
    """The most seconds of device time that other keys get between two services of a key whose pass takes `own_s`, given
    how many members each of them has and how long its pass takes."""
    rounds = int(own_s / QUANTUM_S) + 3
    return sum(rounds * members * QUANTUM_S + cost for members, cost in others)
