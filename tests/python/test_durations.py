"""What tells a pass that hangs from one that is long."""

from __future__ import annotations

import pytest
from starweave_image.device.durations import Current, Durations, Kind

SMALL, LARGE = Kind("unet", "small", 100), Kind("unet", "large", 400)
DECODE = Kind("vae", "small", 100)


def after(*passes: tuple[Kind, float]) -> Durations:
    durations = Durations()
    for kind, seconds in passes:
        durations.begin(10.0, kind)
        durations.end(10.0 + seconds)
        durations.rest()
    return durations


def begun(durations: Durations, kind: Kind | None) -> tuple[float, bool]:
    durations.begin(20.0, kind)
    assert durations.current is not None and durations.current.begun == 20.0
    return durations.current.usual_s, durations.current.known


def test_nothing_is_known_of_the_first_pass() -> None:
    assert after().current is None
    assert begun(after(), SMALL) == (0.0, False)
    assert begun(after(), None) == (0.0, False)


def test_a_kind_that_ended_well_is_known() -> None:
    assert begun(after((SMALL, 2.0)), SMALL) == (2.0, True)
    failed = after((DECODE, 1.0))
    failed.begin(10.0, SMALL)
    failed.begin(11.0)
    assert failed.current == Current(11.0, 1.0, False)
    assert begun(failed, SMALL) == (1.0, False)


def test_between_passes_the_device_is_at_something_else_until_it_rests() -> None:
    durations = Durations()
    durations.begin(10.0, SMALL)
    durations.end(10.5)
    assert durations.current == Current(10.5, 0.5, False)
    durations.rest()
    assert durations.current is None


def test_the_longest_counts_and_fades() -> None:
    assert begun(after((SMALL, 1.0), (SMALL, 3.0), (SMALL, 1.0)), SMALL) == (pytest.approx(2.7), True)
    # One for which kernels were compiled is forgotten within a picture or two.
    assert begun(after((SMALL, 70.0), *[(SMALL, 0.4)] * 50), SMALL) == (pytest.approx(0.4), True)


def test_what_is_not_known_is_estimated_high() -> None:
    durations = after((SMALL, 2.0), (DECODE, 5.0))
    # The same network with four times as much: sixteen times as long, as attention may take.
    assert begun(durations, LARGE) == (32.0, False)
    assert begun(durations, SMALL._replace(shape="other", size=10)) == (5.0, False)
    # Less may take as long: what it costs to begin does not shrink.
    assert begun(after((SMALL, 2.0)), SMALL._replace(shape="other", size=10)) == (2.0, False)
    assert begun(durations, Kind("text encoder", "any", 1000)) == (5.0, False)
    assert begun(durations, None) == (5.0, False)


def test_kinds_that_are_not_seen_for_long_are_forgotten() -> None:
    kinds = [Kind("unet", shape, 100) for shape in range(256)]
    assert begun(after((SMALL, 1.0), *((kind, 1.0) for kind in kinds[:255])), SMALL)[1]
    durations = after((SMALL, 1.0), *((kind, 1.0) for kind in kinds))
    assert not begun(durations, SMALL)[1]
    assert begun(durations, kinds[0])[1] and begun(durations, kinds[-1])[1]
