import sys
import time

import pytest

from nanogpt_lit.runtime.clock import Sleeps, awake_s, elapsed_s


def test_sleep_is_what_one_clock_counts_and_the_other_does_not():
    clocks = {"elapsed": 1000.0, "awake": 400.0}
    sleeps = Sleeps(lambda: clocks["elapsed"], lambda: clocks["awake"])
    told = []
    for slept in (0.0, 3600.0, 0.0, 4.0, 4.0, 0.0):  # of the short ones the first may be the clocks' own inaccuracy
        clocks["awake"] += 60.0
        clocks["elapsed"] += 60.0 + slept
        told.append(sleeps.since_last_s())
    assert told == [0.0, 3600.0, 0.0, 0.0, 8.0, 0.0]


def test_while_the_machine_is_awake_both_clocks_pass_alike():
    began = awake_s(), elapsed_s()
    time.sleep(0.1)
    awake, elapsed = awake_s() - began[0], elapsed_s() - began[1]
    assert awake > 0.05
    assert elapsed == pytest.approx(awake, abs=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="the names of Linux")
def test_the_clocks_are_those_that_linux_stops_and_does_not_stop_in_sleep():
    assert awake_s() == pytest.approx(time.clock_gettime(time.CLOCK_MONOTONIC), abs=0.5)
    assert elapsed_s() == pytest.approx(time.clock_gettime(time.CLOCK_BOOTTIME), abs=0.5)
