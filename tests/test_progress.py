"""How far work is: a bar on a terminal, lines now and then in a file, nothing that fails the work."""

import io
import sys
from pathlib import Path

import pytest

import progress
from progress import say, tell, visible


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as a test says."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def work(clock, parts: int, seconds: float, units: int = 1) -> None:
    with progress.progress(parts * units, "PPO", "update") as advance:
        for number in range(parts):
            clock[0] += seconds
            advance({"reward": f"{number / 2:.2f}", "kl": "3"}, units)


def test_a_file_gets_a_line_every_half_minute_and_one_at_the_end(clock, monkeypatch):
    """Parts of 7 seconds: the first 30 are over with the 5th, the next ones with the 10th; and the 12th is the last."""
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    work(clock, parts=12, seconds=7)
    assert file.getvalue().splitlines() == [
        "PPO: 5/12 [00:35<00:49,  7.00s/update, reward=2.00, kl=3]",
        "PPO: 10/12 [01:10<00:14,  7.00s/update, reward=4.50, kl=3]",
        "PPO: 12/12 [01:24<00:00,  7.00s/update, reward=5.50, kl=3]",
    ]
    assert "\r" not in file.getvalue() and "\x1b" not in file.getvalue()


def test_work_of_any_number_of_short_parts_is_one_line_in_a_file(clock, monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    work(clock, parts=40, seconds=0.25, units=4)
    assert file.getvalue() == "PPO: 160/160 [00:10<00:00, 16.00update/s, reward=19.50, kl=3]\n"


def test_a_terminal_gets_a_bar_that_moves_in_its_place(clock, monkeypatch):
    file = Terminal()
    monkeypatch.setattr(sys, "stderr", file)
    work(clock, parts=2, seconds=1)
    assert "\rPPO:   0%|" in file.getvalue() and "\rPPO: 100%|" in file.getvalue()
    assert "2/2" in file.getvalue() and "reward=0.50, kl=3" in file.getvalue()


@pytest.mark.parametrize("stream", [None, FullDisk()])
def test_no_work_fails_for_what_is_said_of_it(stream, clock, monkeypatch, capsys):
    """Standard error has been closed, or its disk is full; nothing is said on standard output instead."""
    monkeypatch.setattr(sys, "stderr", stream)
    tell("using a run")
    work(clock, parts=2, seconds=40)
    assert capsys.readouterr().out == ""


def test_what_is_said_beside_a_bar_is_on_standard_output(capsys):
    tell("using a run")
    say("alarm at update 3")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("alarm at update 3\n", "using a run\n")


def test_every_bar_is_this_one():
    modules = Path(progress.__file__).parent.glob("*.py")
    assert [path.name for path in modules if "tqdm" in path.read_text(encoding="utf-8")] == ["progress.py"]


# ----------------------------------------------------------------------------------------------------------------
# What a terminal would obey
# ----------------------------------------------------------------------------------------------------------------

STEERING = {
    "clears the screen": ("a\x1b[2Jb", r"a\x1b[2Jb"),
    "a link": ("\x1b]8;;http://x\x07y\x1b]8;;\x07", r"\x1b]8;;http://x\x07y\x1b]8;;\x07"),
    "one byte of C1": ("\x9b2J\x85", r"\x9b2J\x85"),
    "writes over": ("good\rbad\x08\x7f", r"good\rbad\x08\x7f"),
    "another order": ("\u202eabc\u202c \u2066d\u2069", r"\u202eabc\u202c \u2066d\u2069"),
    "NUL and bell": ("\0\a", r"\x00\x07"),
}


@pytest.mark.parametrize("name", STEERING)
def test_what_would_steer_a_terminal_is_shown_as_an_escape(name):
    text, shown = STEERING[name]
    assert visible(text) == visible(text, keep="") == shown
    assert shown.isprintable() and visible(shown) == shown


def test_letters_of_every_script_are_shown_as_they_are():
    text = "Ein Café\n\tКино \u200fسينما\u200f 映画 👩\u200d👧 e\u0301\u00a0\\ 'x'"
    assert visible(text) == text
    assert visible("a\n\tb", keep="") == r"a\n\tb"


def test_what_is_told_and_said_cannot_steer_the_terminal(capsys):
    tell("no file \x1b[1A\nusing other")
    say("two lines\nof \x1b[1A")
    captured = capsys.readouterr()
    assert captured.err == "no file \\x1b[1A\\nusing other\n"
    assert captured.out == "two lines\nof \\x1b[1A\n"
