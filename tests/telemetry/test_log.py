"""Log lines: their form, what they leave out, and a writer that never makes its caller wait."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stretto.telemetry.log import LONGEST_LINE, LineFormat, LineWriter, request_id, timestamp

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
LINE = re.compile(rf"{TIME} (debug|info|warning|error|critical) server \S+: .*")


def line(message: str, *args: object, error: BaseException | None = None, **extra: str) -> str:
    info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord("stretto.engine.client", logging.ERROR, __file__, 1, message, args, info)
    record.__dict__.update(extra)
    return LineFormat("server").format(record)


def test_a_line_has_time_level_process_place_and_request() -> None:
    assert timestamp(1_700_000_000.0625) == "2023-11-14T22:13:20.062Z"
    assert re.fullmatch(LINE, line("the engine ended"))
    assert line("ended").endswith(" error server engine.client: ended")
    assert line("ended", request_id="abc").endswith("ended request_id=abc")
    token = request_id.set("of-this-task")
    assert line("ended").endswith("ended request_id=of-this-task")
    request_id.reset(token)


@pytest.mark.parametrize(
    "evil", ["a\nb", "a\r\nb", "a\x1b[2Jb", "a\x00b", "a\x7fb", "a\x85b", "a\u2028b", "a\u202eb"]
)
def test_no_text_can_forge_a_second_line_or_move_the_cursor(evil: str) -> None:
    seen = line("the engine cannot start: %s", evil)
    assert re.fullmatch(LINE, seen)
    assert len(seen.splitlines()) == 1
    assert re.search(r"a\\u[0-9a-f]{4}(\\u000a|\[2J)?b$", seen)


def test_a_huge_message_is_cut() -> None:
    assert len(line("%s", "x" * 10**7)) < LONGEST_LINE + 100


def test_an_exception_shows_types_and_places_but_no_message() -> None:
    try:
        try:
            raise KeyError("secret prompt")
        except KeyError as cause:
            raise ValueError("secret answer") from cause
    except ValueError as error:
        seen = line("a step failed", error=error, request_id="r1")
    assert "secret" not in seen
    assert re.search(
        r"a step failed request_id=r1: ValueError at \S+test_log.py:\d+, caused by KeyError at \S+", seen
    )


def test_lines_are_written_in_order_and_close_writes_what_waits(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        writer = LineWriter(file.fileno())
        for number in range(1000):
            writer.write(b"%d" % number)
        writer.close()
    assert (tmp_path / "log").read_text().split() == [str(number) for number in range(1000)]
    assert writer.dropped == 0


def test_a_reader_that_never_reads_costs_lines_but_no_time() -> None:
    """A pipe holds 64 KiB. 4 MB of lines neither wait nor fill the memory, and the losses are counted."""
    read, write = os.pipe()
    writer = LineWriter(write, limit=64)
    began = time.process_time()
    for _ in range(4000):
        writer.write(b"x" * 1000)
    assert time.process_time() - began < 1
    assert 4000 - 3 * 64 - 66 <= writer.dropped < 4000
    os.close(read)  # the write that waits fails
    writer.close()
    os.close(write)


def test_a_full_file_is_counted_and_the_lines_after_it_are_whole(tmp_path: Path) -> None:
    """In a process of its own with files of 1,000 bytes at most. Later the limit is lifted."""
    script = """
import os, resource, sys, time
from stretto.telemetry.log import LineWriter
soft = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, soft[1]))
writer = LineWriter(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT))
for number in range(100):
    writer.write(b"x" * 63)
while not writer.dropped:
    time.sleep(0.01)
print(writer.dropped)
resource.setrlimit(resource.RLIMIT_FSIZE, soft)
writer.write(b"whole")
writer.close()
"""
    path = tmp_path / "log"
    dropped = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, check=True, timeout=30
    )
    assert int(dropped.stdout) == 100 - 1000 // 64
    lines = path.read_text().splitlines()
    assert lines[:15] == ["x" * 63] * 15
    assert lines[-1] == "whole"
    assert len(lines) == 17, "15 whole lines, one that was cut, one written later"


def test_uncaught_errors_and_warnings_have_the_form_of_other_lines() -> None:
    script = """
import logging, threading, warnings
from stretto.telemetry import log
log.configure("server", "warning")
logging.getLogger("stretto").info("below the level")
warnings.warn("old")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start(); thread.join()
raise KeyError("secret")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    lines = done.stderr.splitlines()
    assert len(lines) == 3 and all(re.fullmatch(LINE, each) for each in lines), done.stderr
    assert [re.search(r"old|ZeroDivisionError|KeyError", each) is not None for each in lines] == [True] * 3
    assert "secret" not in done.stderr and done.returncode == 1
