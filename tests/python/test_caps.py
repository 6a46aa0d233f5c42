from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starweave_image.device.caps import FIRST_ROWS, LONGEST_S, MOST_ROWS, Caps, Profile

MB = 1024 * 1024


def profile(*sizes: tuple[int, float, int]) -> Profile:
    profile = Profile()
    for rows, seconds, bytes in sizes:
        profile.record(rows, seconds, bytes)
    return profile


def test_a_limit_starts_small_and_doubles_with_what_has_worked() -> None:
    assert Profile().most(10**12) == FIRST_ROWS
    assert profile((3, 0.1, 0)).most(10**12) == 6
    assert profile((2, 0.1, 0), (MOST_ROWS, 0.1, 0)).most(10**12) == MOST_ROWS


def test_the_memory_model_is_a_line_through_the_peaks() -> None:
    known = profile((2, 0.1, 30 * MB), (4, 0.1, 40 * MB), (8, 0.1, 60 * MB))
    base, slope = known.line()
    assert (base, slope) == (pytest.approx(20 * MB), pytest.approx(5 * MB))
    # 0.9 of what is free is counted on: (0.9 * 100 - 20) / 5 = 14.
    assert known.most(100 * MB) == known.ceiling(100 * MB) == 14
    assert known.most(10**12) == 16 and known.ceiling(10**12) == MOST_ROWS
    assert known.ceiling(MB) == 1


def test_of_one_size_the_quickest_pass_and_the_highest_peak_count() -> None:
    known = profile((2, 3.0, 10 * MB), (2, 1.0, 20 * MB), (2, 2.0, 5 * MB))
    assert (known.sizes[2].seconds, known.sizes[2].bytes, known.sizes[2].count) == (1.0, 20 * MB, 3)


def test_one_size_alone_counts_by_the_row() -> None:
    assert profile((2, 0.1, 20 * MB)).line() == (0.0, 10 * MB)
    # So do peaks that fall with the rows: they say that memory was kept from before.
    assert profile((2, 0.1, 20 * MB), (4, 0.1, 10 * MB)).line() == (0.0, 10 * MB)


def test_no_pass_gets_long_by_adding_to_it() -> None:
    assert profile((2, LONGEST_S / 2, 0)).most(10**12) == 4
    assert profile((2, LONGEST_S * 3, 0)).most(10**12) == 2


def test_what_ran_out_of_memory_is_not_tried_again_until_more_is_free() -> None:
    known = profile((2, 0.1, 0), (4, 0.1, 0))
    known.overflow = (8, 100 * MB)
    assert known.most(100 * MB) == 7
    assert known.most(200 * MB) == 8


@given(
    st.dictionaries(st.integers(1, 64), st.tuples(st.floats(0.0, 100.0), st.integers(0, 10**12)), max_size=8),
    st.integers(0, 10**13),
)
def test_a_limit_is_always_at_least_one(sizes: dict[int, tuple[float, int]], free: int) -> None:
    known = profile(*((rows, seconds, bytes) for rows, (seconds, bytes) in sizes.items()))
    assert 1 <= known.most(free) <= known.ceiling(free) <= MOST_ROWS


def test_limits_are_kept_for_the_next_run_beside_those_of_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "limits.json"
    one, two = (Caps(path, lambda: 10**12) for _ in range(2))
    one.record("a", 4, 0.1, 0)
    two.record("b", 8, 0.1, 0)
    one.save()
    two.save()
    again = Caps(path, lambda: 10**12)
    assert (again.rows("a"), again.rows("b"), again.rows("c")) == (8, 16, FIRST_ROWS)
    assert not again.wants("a", 4) or again.wants("a", 5)
    assert [file.name for file in path.parent.iterdir()] == ["limits.json"]


def test_a_file_that_is_damaged_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "limits.json"
    path.write_bytes(b'{"a": {"sizes": 3}')
    caps = Caps(path, lambda: 10**12)
    assert caps.rows("a") == FIRST_ROWS
    caps.overflow("a", 2)
    assert Caps(path, lambda: 10**12).rows("a") == 1


def test_what_is_measured_often_enough_is_measured_no_more() -> None:
    caps = Caps(None, lambda: 10**12)
    assert caps.wants("a", 2)
    for _ in range(3):
        caps.record("a", 2, 0.1, 0)
    assert not caps.wants("a", 2) and caps.wants("a", 4)
