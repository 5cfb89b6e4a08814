"""The heartbeat: the verdicts of the watch, and the end of an engine whose server is gone."""

from __future__ import annotations

import socket
import subprocess
import sys

from stretto.engine.heartbeat import BEAT_S, GONE, TURNS, Watch

TIMEOUT_S = 5.0
BEATS = int(TIMEOUT_S / BEAT_S)


def test_an_engine_that_beats_and_turns_is_well() -> None:
    watch = Watch(TIMEOUT_S)
    assert {watch.tick(turns, 0.0, loaded=True) for turns in range(100 * BEATS)} == {"well"}


def test_a_silent_engine_is_stalled_within_two_seconds_and_hung_after_the_timeout() -> None:
    watch = Watch(TIMEOUT_S)
    watch.tick(1, 0.0, loaded=True)
    verdicts = [watch.tick(None, 0.0, loaded=True) for _ in range(BEATS)]
    assert (verdicts.index("stalled") + 1) * BEAT_S < 2.0 - BEAT_S
    assert verdicts.index("hung") + 1 == BEATS
    assert watch.reason == "the engine has not responded for 5 s"


def test_an_engine_that_wakes_up_is_well_at_once() -> None:
    watch = Watch(TIMEOUT_S)
    verdicts = [watch.tick(None, 0.0, loaded=True) for _ in range(BEATS - 1)]
    assert verdicts[-1] == "stalled" and watch.tick(2, 0.0, loaded=True) == "well"


def test_a_compiler_that_holds_the_lock_is_not_a_stall() -> None:
    """It delays the heartbeats, but the process uses processor time."""
    watch = Watch(TIMEOUT_S)
    verdicts = {watch.tick(None, beat * BEAT_S, loaded=True) for beat in range(1, 9 * BEATS)}
    assert verdicts == {"well"}


def test_a_long_step_is_well_and_an_endless_one_is_hung() -> None:
    watch = Watch(TIMEOUT_S)
    verdicts = [watch.tick(7, 0.0, loaded=True) for _ in range(10 * BEATS + 1)]
    assert set(verdicts[:-1]) == {"well"} and verdicts[-1] == "hung"
    assert watch.reason == "a step of the engine has not ended for 50 s"


def test_loading_may_be_silent_for_ten_times_as_long_but_not_for_ever() -> None:
    watch = Watch(TIMEOUT_S)
    verdicts = [watch.tick(None, 0.0, loaded=False) for _ in range(10 * BEATS)]
    assert set(verdicts[:-1]) == {"well"} and verdicts[-1] == "hung"
    watch = Watch(TIMEOUT_S)
    assert {watch.tick(0, 0.0, loaded=False) for _ in range(100 * BEATS)} == {"well"}, "it loads and beats"


PULSE = """
import sys, time
from stretto.engine.heartbeat import Pulse
pulse = Pulse(int(sys.argv[1]))
while True:
    pulse.turns += 1
    time.sleep(0.01)
"""


def test_the_pulse_counts_turns_and_ends_the_process_when_the_server_is_gone() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-c", PULSE, str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    with ours:
        ours.settimeout(10)
        first, second = (TURNS.unpack(ours.recv(8))[0] for _ in range(2))
        assert second > first
    assert process.wait(5) == GONE
