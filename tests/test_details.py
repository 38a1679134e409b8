"""What docs/implementation_details.md names exists, and each test that it names fails where its detail is broken."""

import functools
import re
import subprocess
import sys

import pytest
from details import (
    PAGE,
    ROOT,
    Break,
    Detail,
    Verdict,
    breaks,
    broken_source,
    details,
    fault,
    function_lines,
    missing_figures,
    read_detail,
    sections,
)

from config import Config

DETAILS = details()
BREAKS = breaks()
NAMES = [f"{detail.number}" for detail in DETAILS]
FEWEST = 40
SECONDS = 3600  # for all details, one after the other, on a machine that has other work


@functools.cache
def names_in(file: str) -> set[str]:
    """Of the tests in a file."""
    return set(re.findall(r"^def (test_\w+)\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))


def test_details_are_numbered_without_a_gap_and_are_many():
    assert [detail.number for detail in DETAILS] == list(range(1, len(DETAILS) + 1))
    assert len(DETAILS) >= FEWEST
    assert len({detail.title for detail in DETAILS}) == len(DETAILS)
    told = re.search(r"and (\d+) details like those below", PAGE.read_text(encoding="utf-8"))
    assert int(told[1]) == len(DETAILS)


@pytest.mark.parametrize("detail", DETAILS, ids=NAMES)
def test_a_detail_has_all_its_parts_and_what_it_names_exists(detail):
    assert all(detail.parts.values())
    assert detail.title.endswith(".") and len(detail.title.split()) > 3
    file, _, function = detail.parts["Code"].partition(":")
    test_file, _, test = detail.parts["Test"].partition("::")
    assert function_lines((ROOT / file).read_text(encoding="utf-8"), function)
    assert test in names_in(test_file)
    assert [(PAGE.parent / link).resolve() for link in detail.links] == [ROOT / file, ROOT / test_file]


def test_every_file_test_and_flag_that_the_page_names_exists():
    """Not only in the entries: in what stands around them, too."""
    page = PAGE.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", page):
        assert (PAGE.parent / link).exists(), link
    every_test = set().union(*(names_in(f"tests/{file.name}") for file in (ROOT / "tests").glob("test_*.py")))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 5 and named <= every_test, named - every_test
    options = set(Config.__dataclass_fields__)
    flags = {flag.removeprefix("no-") for flag in re.findall(r"`--([\w-]+)", page)}
    assert flags <= options, flags - options


def test_every_deliberate_difference_says_why_and_how_one_has_it_otherwise():
    page = PAGE.read_text(encoding="utf-8")
    differences = re.split(r"^- ", page[page.index("## What is deliberately different") :], flags=re.MULTILINE)[1:]
    assert len(differences) > 15
    for text in differences:
        assert text.startswith("**") and "*Why:*" in text and "*The other way:*" in " ".join(text.split()), text[:60]


def test_every_detail_has_one_broken_line_in_the_function_that_it_names():
    """And is for the very test that the page names; the broken source is still Python, and another."""
    assert [change.detail for change in BREAKS] == [detail.number for detail in DETAILS]
    for detail, change in zip(DETAILS, BREAKS, strict=True):
        file, _, function = detail.parts["Code"].partition(":")
        assert (change.file, change.test) == (file, detail.parts["Test"]), detail.number
        source = (ROOT / file).read_text(encoding="utf-8")
        broken = broken_source(source, function, change)
        compile(broken, file, "exec")
        assert broken != source, detail.number


ENTRY = """### 7. A title of four words.

What it is. *Why:* Because. *Otherwise:* It is off by **1.16** and **2.2e-8**, of 5.

*Paper:* none · *Code:* [`ppo.py:masked_mean`](../ppo.py) ·
*Test:* [`tests/test_ppo.py::test_x`](../tests/test_ppo.py)"""


def test_an_entry_is_read_by_its_form():
    detail = read_detail(ENTRY)
    assert (detail.number, detail.title) == (7, "A title of four words.")
    assert detail.parts["What"] == "What it is." and detail.parts["Why"] == "Because."
    assert (detail.parts["Code"], detail.parts["Test"]) == ("ppo.py:masked_mean", "tests/test_ppo.py::test_x")
    assert detail.figures == ["1.16", "2.2e-8"]
    assert sections(f"# Page\n\n## Group\n\n{ENTRY}\n\n## Other\n\ntext\n") == [ENTRY]
    for part in ("*Why:*", "*Otherwise:*", "*Paper:*", "*Code:*", "*Test:*", "### 7. "):
        with pytest.raises(ValueError, match="not in the form of an entry"):
            read_detail(ENTRY.replace(part, ""))


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (Verdict(False, True, "AssertionError: 1.1605 and 2.16e-08"), ""),
        (Verdict(True), "does not notice"),
        (Verdict(False, False, "ImportError: no"), "by no assertion of its own: ImportError: no"),
        (Verdict(False, True, "AssertionError: 1.15 and 2.16e-08"), "does not say 1.16"),
        (Verdict(False, True, "AssertionError: 1.1605 and 2.26e-08"), "does not say 2.2e-8"),
    ],
)
def test_what_is_wrong_with_a_verdict_by_hand(verdict, words):
    found = fault(read_detail(ENTRY), verdict)
    assert (words in found) if words else found == ""


def test_figures_are_compared_as_they_are_rounded():
    detail = Detail(1, "", {"Otherwise": "**2** of **0.35**"}, ("", ""))
    assert missing_figures(detail, "2.4 and 0.349") == []
    assert missing_figures(detail, "2.6 and 0.344") == ["2", "0.35"]


def test_a_line_is_broken_in_its_function_alone():
    source = "class A:\n    @x\n    def f(self):\n        return 1\n\n    def g(self):\n        return 1\n"
    change = Break(1, "a.py", "return 1", "return 2", "")
    assert broken_source(source, "A.g", change) == source[::-1].replace("1 nruter", "2 nruter", 1)[::-1]
    assert function_lines(source, "A.f") == range(1, 4)
    for function, words in (("A.h", "there is no A.h"), ("A", "has 2 lines 'return 1'")):
        with pytest.raises(ValueError, match=words):
            broken_source(source.replace("class A", "@y\nclass A"), function, change)


@pytest.mark.slow
def test_every_test_passes_as_it_is_and_fails_by_its_own_assertion_where_its_detail_is_broken():
    """In a process that has imported nothing of the project, as `python tests/details.py` does it."""
    command = [sys.executable, str(ROOT / "tests/details.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    faulty = [line for line in done.stdout.splitlines() if not line.endswith(" noticed")]
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(DETAILS), (faulty, done.stderr[-2000:])
