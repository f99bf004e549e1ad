import io
import os
import re
import subprocess
import sys
import time
from datetime import datetime

import pytest

if os.name == "posix":
    import pty
    import termios
from small_runs import fit, small_run

from nanogpt_lit.run.terminal import Progress, arrival, live_line
from nanogpt_lit.runtime.clock import Sleeps


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_time_left_counts_validation_and_leaves_out_the_slow_first_step():
    clock = Clock()
    progress = Progress(total_steps=11, stream=(stream := io.StringIO()), clock=clock)
    clock.now_s = 100.0  # compiling
    progress.update(1, None, None)
    assert stream.getvalue().splitlines()[0] == "first step after 100.0 s"
    assert progress.remaining_s(1, clock.now_s) is None
    for step in range(2, 7):
        clock.now_s += 1.0
        progress.update(step, 2.0, 1000.0)
    clock.now_s += 5.0  # validation
    assert progress.remaining_s(6, clock.now_s) == pytest.approx(5 * 10.0 / 5)
    assert stream.getvalue().count("first step") == 1


def test_the_first_step_is_counted_from_the_command_with_all_that_is_imported_and_compiled(text, tmp_path):
    options = small_run(text, tmp_path, "--trainer.max_steps=1", "--trainer.enable_progress_bar=true")
    command = [sys.executable, "-m", "nanogpt_lit", "fit", *options]
    began_s = time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        said_s = next(
            float(found[1]) for line in process.stderr if (found := re.match("first step after (.*) s", line))
        )
        waited_s = time.monotonic() - began_s
        process.communicate(timeout=120)
    # Less what Python needs until the package is there.
    assert waited_s - 1.0 < said_s < waited_s


def test_a_log_file_gets_a_line_every_ten_seconds_and_at_the_last_step():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(total_steps=30, stream=stream, clock=clock)
    for step in range(1, 31):
        clock.now_s += 1.0
        progress.update(step, 2.5, 1234.0)
    progress.close()
    _, *lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["10/30", "20/30", "30/30"]
    assert "loss 2.500" in lines[0]
    assert "1,234 tokens/s" in lines[0]
    assert "0:20 left, done" in lines[0]


def test_a_night_asleep_is_said_once_and_moves_the_time_of_arrival_by_nothing():
    awake, asleep, stream = Clock(), Clock(), io.StringIO()
    sleeps = Sleeps(lambda: awake.now_s + asleep.now_s, awake)
    progress = Progress(total_steps=11, stream=stream, clock=awake, sleeps=sleeps)
    for step in range(1, 7):
        awake.now_s += 1.0
        asleep.now_s = 8 * 3600.0 if step > 3 else 0.0
        progress.update(step, 2.0, 1000.0)
    assert progress.remaining_s(6, awake.now_s) == pytest.approx(5.0)
    assert stream.getvalue().count("this machine slept for 8:00:00, which counts in neither") == 1


def test_a_terminal_gets_a_bar_that_ends_at_the_last_step():
    stream = Terminal()
    progress = Progress(total_steps=4, stream=stream)
    for step in range(1, 5):
        progress.update(step, 2.5, 1234.0)
    progress.close()
    assert "step 4/4" in stream.getvalue()
    assert "loss 2.500" in stream.getvalue()


@pytest.mark.parametrize("columns", [30, 60, 80, 120])
@pytest.mark.parametrize("remaining_s", [125.0, 20 * 3600.0, 3 * 86400.0])
def test_a_narrow_terminal_loses_the_bar_and_the_speed_and_never_the_time_left(columns, remaining_s):
    said = arrival(remaining_s, datetime(2026, 11, 26, 12, 0))
    bar, line = live_line(columns, "step 12345/60000  21%", "loss 3.456", "4,830 tokens/s", said)
    assert len(line) + (bar + 1 if bar else 0) <= max(columns, len("step 12345/60000  21%") + 2 + len("20:00:00 left"))
    assert said.partition(",")[0] in line
    if columns >= 60:
        assert "loss 3.456" in line
    if columns >= 120:
        assert (bar, line) == (20, f"step 12345/60000  21%  loss 3.456  4,830 tokens/s  {said}")


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX's")
def test_a_terminal_of_60_columns_shows_the_time_left_to_the_end():
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 60))
    clock = Clock()
    with os.fdopen(follower, "w") as stream:
        progress = Progress(total_steps=60_000, first_step=12_000, stream=stream, clock=clock)
        for step in (12_001, 12_002):
            clock.now_s += 1.0
            progress.update(step, 3.4567, 4830.0)
        progress.close()
        stream.flush()
        shown = ""
        while "12002" not in shown or not shown.endswith("\n"):  # a terminal hands over what it has by then
            shown += os.read(leader, 10_000).decode()
    os.close(leader)
    last = shown.split("\r")[-2].strip()
    assert re.fullmatch(r"step 12002/60000  20% \S+ +loss 3\.457  13:19:58 left", last)
    assert all(len(line) <= 60 for line in re.split(r"[\r\n]+", shown))


def test_a_resumed_run_starts_where_it_was():
    stream = Terminal()
    Progress(total_steps=10, first_step=6, stream=stream).close()
    assert "step 6/10" in stream.getvalue()


@pytest.mark.parametrize(
    ("remaining_s", "text"),
    [
        (65, "1:05 left, done 12:01"),
        (3 * 3600 + 62, "3:01:02 left, done 15:01"),
        (13 * 3600, "13:00:00 left, done Fri 27 Nov 01:00"),
        (3 * 86400 + 4 * 3600, "3 d 4 h left, done Sun 29 Nov 16:00"),
        (1e15, "years left"),
    ],
)
def test_arrival_names_the_day_when_it_is_not_today(remaining_s, text):
    assert arrival(remaining_s, datetime(2026, 11, 26, 12, 0)) == text


def test_a_fit_shows_one_line_of_progress_and_not_lightnings_bar(text, tmp_path, capsys):
    assert fit(*small_run(text, tmp_path), "--trainer.enable_progress_bar=true") == 0
    shown = capsys.readouterr()
    assert "step 8/8" in shown.err
    assert "Epoch" not in shown.out + shown.err


def test_a_bar_that_the_yaml_names_takes_the_place_of_the_line(text, tmp_path, capsys):
    options = small_run(text, tmp_path, "--trainer.callbacks+=TQDMProgressBar", "--trainer.enable_progress_bar=true")
    assert fit(*options) == 0
    shown = capsys.readouterr()
    assert "step 8/8" not in shown.err
    assert "Epoch" in shown.out + shown.err
