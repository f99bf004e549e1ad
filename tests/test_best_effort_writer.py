"""Curves while the disk takes nothing: points are missing, and nothing else."""

import threading

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.record_writer import RecordWriter

from nanogpt_lit.run.curves import BestEffortWriter


@pytest.fixture
def disk(monkeypatch):
    """disk(full=True) takes half of a record and no more."""
    write, state = RecordWriter.write, {"full": False}

    def limited(self, record):
        if state["full"]:
            self._writer.write(record[: len(record) // 2])
            self._writer.flush()
            raise OSError(28, "No space left on device")
        write(self, record)

    monkeypatch.setattr(RecordWriter, "write", limited)
    # Files of one second are read in the order of a number in their names, where 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    # The thread of TensorBoard's writer ends by the error, which its next caller gets.
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    return lambda full: state.update(full=full)


def draw(writer, steps):
    for step in steps:
        writer.add_scalar("train/loss", float(step), step)
    writer.add_text("sample", "some text", steps[-1])


def curve(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def test_a_full_disk_leaves_points_out_and_what_was_and_what_comes_is_read(tmp_path, disk, capsys):
    writer = BestEffortWriter(str(tmp_path), purge_step=1)
    draw(writer, range(1, 11))
    writer.flush()
    disk(full=True)
    for steps in (range(11, 21), range(21, 31)):
        draw(writer, steps)
        writer.flush()
    disk(full=False)
    writer.flush()
    draw(writer, range(31, 41))
    writer.close()
    assert curve(tmp_path) == [(step, float(step)) for step in (*range(1, 11), *range(31, 41))]
    said = capsys.readouterr().err.splitlines()  # and no traceback of the thread
    assert len(said) == 2
    assert said[0].startswith("warning: the curves cannot be written: No space left on device. Training")
    assert said[1] == "the curves are written again"


def test_a_disk_that_is_full_to_the_end_lets_the_run_end(tmp_path, disk, capsys):
    writer = BestEffortWriter(str(tmp_path))
    disk(full=True)
    draw(writer, range(1, 100))
    writer.flush()
    writer.close()
