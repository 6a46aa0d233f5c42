"""The policy alone: which calls share the next pass, and whose turn it is. A clock and a device are simulated."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starweave_image.device.batching import GUARD_S, Batch, Batcher, Call, wait_bound


def batcher(limit: int = 100) -> Batcher[str]:
    return Batcher(lambda _: limit)


def names(batch: Batch[str] | float | None) -> str:
    assert isinstance(batch, Batch), batch
    return "".join(call.member for call in batch.calls)


def run(batcher: Batcher[str], batch: Batch[str] | float | None, seconds: float = 0.01) -> None:
    assert isinstance(batch, Batch)
    batcher.begin(batch)
    batcher.ran(batch, seconds)


def test_nobody_waits_for_nobody() -> None:
    assert batcher().next(0.0) is None


def test_all_that_wait_with_one_key_share_a_pass() -> None:
    b = batcher()
    for member in "abc":
        b.add(Call(member, "key", 2))
    assert names(b.next(0.0)) == "abc"


def test_other_keys_have_passes_of_their_own() -> None:
    b = batcher()
    for member, key in zip("abcd", ("x", "y", "x", "y"), strict=True):
        b.add(Call(member, key, 1))
    first = b.next(0.0)
    run(b, first, seconds=1.0)
    second = b.next(0.0)
    assert {names(first), names(second)} == {"ac", "bd"}


def test_a_pass_waits_for_members_on_their_way_back_and_no_longer_than_the_guard() -> None:
    b = batcher()
    calls = {member: Call(member, "key", 1) for member in "ab"}
    for call in calls.values():
        b.add(call)
    run(b, b.next(0.0))
    b.add(Call("a", "key", 1))
    assert b.next(5.0) == pytest.approx(GUARD_S)
    b.add(Call("b", "key", 1))
    assert names(b.next(5.0)) == "ab"

    run(b, b.next(5.0))
    b.add(Call("a", "key", 1))
    assert isinstance(b.next(6.0), float)
    assert names(b.next(6.0 + GUARD_S)) == "a"


def test_a_long_pass_is_waited_for_longer() -> None:
    b = batcher()
    for member in "ab":
        b.add(Call(member, "key", 1))
    run(b, b.next(0.0), seconds=2.0)
    b.add(Call("a", "key", 1))
    assert b.next(3.0) == 1.0


def test_who_has_left_is_not_waited_for() -> None:
    b = batcher()
    for member in "ab":
        b.add(Call(member, "key", 1))
    run(b, b.next(0.0))
    b.add(Call("a", "key", 1))
    b.leave("b")
    assert names(b.next(0.0)) == "a"


def test_who_goes_on_to_another_network_is_not_waited_for() -> None:
    b = batcher()
    for member in "ab":
        b.add(Call(member, "denoise", 1))
    run(b, b.next(0.0))
    b.add(Call("a", "denoise", 1))
    b.add(Call("b", "decode", 1))
    assert {names(b.next(0.0))} <= {"a", "b"}


def test_a_call_can_be_withdrawn() -> None:
    b = batcher()
    call = Call("a", "key", 1)
    b.add(call)
    b.add(Call("b", "key", 1))
    b.leave("a", call)
    assert names(b.next(0.0)) == "b"


def test_a_pass_has_no_more_rows_than_the_limit_unless_one_call_alone_has() -> None:
    b = batcher(limit=4)
    for member, rows in zip("abcd", (2, 2, 2, 9), strict=True):
        b.add(Call(member, "key", rows))
    passes = []
    for _ in range(3):
        batch = b.next(1e9)
        passes.append(names(batch))
        run(b, batch)
        for member in passes[-1]:
            b.leave(member)
    assert passes == ["ab", "c", "d"]
    assert b.next(1e9) is None


def test_a_full_pass_waits_for_nobody() -> None:
    b = batcher(limit=2)
    for member in "abcd":
        b.add(Call(member, "key", 1))
    run(b, b.next(0.0))
    assert names(b.next(0.0)) == "cd"


@dataclass
class Load:
    """A key with so many members, each of which wants so many passes of so many seconds."""

    members: int
    seconds: float
    passes: int


loads = st.lists(
    st.builds(
        Load,
        members=st.integers(1, 6),
        seconds=st.floats(0.001, 3.0),
        passes=st.integers(1, 30),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=200)
@given(loads, st.integers(1, 8))
def test_everyone_is_served_and_nobody_waits_longer_than_the_bound(loads: list[Load], limit: int) -> None:
    b: Batcher[tuple[int, int]] = Batcher(lambda _: limit)
    left = {(k, m): load.passes for k, load in enumerate(loads) for m in range(load.members)}
    for member in left:
        b.add(Call(member, member[0], 1))
    clock, served_others = 0.0, dict.fromkeys(range(len(loads)), 0.0)
    worst = dict.fromkeys(range(len(loads)), 0.0)
    while (batch := b.next(clock)) is not None:
        assert isinstance(batch, Batch)
        key = batch.calls[0].member[0]
        assert {call.member[0] for call in batch.calls} == {key}
        assert len({call.member for call in batch.calls}) == len(batch.calls) <= limit
        worst[key] = max(worst[key], served_others[key])
        served_others[key] = 0.0
        seconds = loads[key].seconds
        waiting = {k for (k, _), passes in left.items() if passes > 0}
        for other in waiting - {key}:
            served_others[other] += seconds
        b.begin(batch)
        clock += seconds
        b.ran(batch, seconds)
        for call in batch.calls:
            left[call.member] -= 1
            if left[call.member]:
                b.add(Call(call.member, key, 1))
            else:
                b.leave(call.member)
    assert set(left.values()) == {0}
    for key, load in enumerate(loads):
        others = [(other.members, other.seconds) for k, other in enumerate(loads) if k != key]
        assert worst[key] <= wait_bound(load.seconds, others) + 1e-6


def test_time_is_shared_evenly_by_members_whatever_a_pass_costs() -> None:
    b = batcher()
    cheap, dear = ("c", 0.01), ("d", 1.0)
    for name, _ in (cheap, dear):
        b.add(Call(name, name, 1))
    spent = {"c": 0.0, "d": 0.0}
    for _ in range(5000):
        batch = b.next(0.0)
        name = names(batch)
        seconds = dict((cheap, dear))[name]
        run(b, batch, seconds)
        b.add(Call(name, name, 1))
        spent[name] += seconds
    assert 0.9 < spent["c"] / spent["d"] < 1.1


def test_going_back_and_forth_between_keys_does_not_clear_debts() -> None:
    b = batcher()
    keys = {"a": ["a1", "a2"], "b": ["b1"]}
    spent = {"a": 0.0, "b": 0.0}
    for name in keys:
        b.add(Call(name, keys[name][0], 1))
    for _ in range(2000):
        batch = b.next(0.0)
        name = names(batch)
        run(b, batch, 0.5)
        spent[name] += 0.5
        keys[name] = keys[name][::-1]
        b.add(Call(name, keys[name][0], 1))
    # Two keys earn for one member at most what two members would.
    assert spent["a"] <= 2.1 * spent["b"] and spent["b"] <= 1.1 * spent["a"]


def test_the_policy_needs_no_torch() -> None:
    import subprocess

    code = "import sys, starweave_image.device.batching as b; assert 'torch' not in sys.modules; print(b.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "starweave_image.device.batching"
