"""Each detail of docs/implementation_details.md, broken on purpose: does the test that the page names notice?

    python tests/details.py              all of them: what each test does where its detail is broken
    python tests/details.py 8 31         those, with what the test says then: the page's figures in bold are from there

data/broken_details.json has for every detail a line of the function that the page names, and that line broken. It is
put into a temporary copy of the project, never into the project itself, and the test is run there in a forked process.
"""

import ast
import functools
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mutate import ROOT, copy_project

PAGE = ROOT / "docs/implementation_details.md"
TABLE = ROOT / "tests/data/broken_details.json"
PARTS = ("What", "Why", "Otherwise", "Paper", "Code", "Test")
# In place of the project's own, with no plugin that none of these tests needs.
OPTIONS = ["-o", "addopts=", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
ENVIRONMENT = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
TIMEOUT = 120  # seconds, for the first test of a process; each other one adds a twelfth of it

# ----------------------------------------------------------------------------------------------------------------------
# What the page and the table say
# ----------------------------------------------------------------------------------------------------------------------

NUMBER = r"\d+(?:\.\d+)?(?:e[-+]?\d+)?"
ENTRY = re.compile(
    r"^### (?P<number>\d+)\. (?P<title>[^\n]+)\n\n"
    r"(?P<What>.+?)\s\*Why:\*\s(?P<Why>.+?)\s\*Otherwise:\*\s(?P<Otherwise>.+?)\n\n"
    r"\*Paper:\*\s(?P<Paper>.+?)\s·\s"
    r"\*Code:\*\s\[`(?P<Code>[^`]+)`\]\((?P<code_link>[^)]+)\)\s·\s"
    r"\*Test:\*\s\[`(?P<Test>[^`]+)`\]\((?P<test_link>[^)]+)\)$",
    re.DOTALL,
)


class Detail(NamedTuple):
    number: int
    title: str
    parts: dict[str, str]  # by PARTS; `file.py:function`, `tests/test_file.py::test`
    links: tuple[str, str]  # of Code and Test, as seen from the page

    @property
    def figures(self) -> list[str]:
        """The numbers in bold of what happens otherwise: they are to be in what the broken test says."""
        return re.findall(rf"\*\*({NUMBER})\*\*", self.parts["Otherwise"])


class Break(NamedTuple):
    """A line of a file, without its indentation, and what stands in its place where the detail is broken."""

    detail: int
    file: str
    before: str
    after: str
    test: str


def sections(page: str) -> list[str]:
    """The text of each detail, from its heading to the next heading of any kind."""
    return [text.strip() for text in re.split(r"^(?=##)", page, flags=re.MULTILINE) if text.startswith("### ")]


def read_detail(section: str) -> Detail:
    """Raises ValueError if the section has not the form of the others."""
    found = ENTRY.match(section)
    if not found:
        raise ValueError(f"not in the form of an entry: {section[:200]}")
    parts = {name: " ".join(found[name].split()) for name in PARTS}
    return Detail(int(found["number"]), found["title"], parts, links=(found["code_link"], found["test_link"]))


def details() -> list[Detail]:
    return [read_detail(section) for section in sections(PAGE.read_text(encoding="utf-8"))]


def breaks() -> list[Break]:
    return [Break(**row) for row in json.loads(TABLE.read_text(encoding="utf-8"))]


@functools.cache
def parsed(source: str) -> ast.AST:
    return ast.parse(source)


def function_lines(source: str, name: str) -> range:
    """The numbers of a function's lines, from 0, its decorators included; `name` may be `Class.function`.

    Raises ValueError if there is no such function.
    """
    node = parsed(source)
    for part in name.split("."):
        inner = [child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == part]
        if not inner:
            raise ValueError(f"there is no {name}")
        node = inner[0]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return range(first - 1, node.end_lineno)


def broken_source(source: str, function: str, change: Break) -> str:
    """The source with the one line changed. Raises ValueError unless the function has that line, once."""
    lines = source.splitlines(keepends=True)
    found = [number for number in function_lines(source, function) if lines[number].strip() == change.before]
    if len(found) != 1:
        raise ValueError(f"{function} of {change.file} has {len(found)} lines {change.before!r}")
    lines[found[0]] = lines[found[0]].replace(change.before, change.after)
    return "".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Running tests in a copy
# ----------------------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """How a test ended: whether it passed; else whether by an assertion of its own, and what that said."""

    passed: bool
    by_its_own: bool = False
    said: str = ""


class Watch:
    """A plugin of pytest that notes the verdict of every test, its parameters taken together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.verdicts: dict[str, Verdict] = {}

    def pytest_runtest_makereport(self, item, call) -> None:
        name = item.nodeid.split("[")[0]
        if call.excinfo is None:
            self.verdicts.setdefault(name, Verdict(passed=True))
            return
        is_assertion = call.excinfo.typename in ("AssertionError", "Failed")  # the latter of pytest.raises
        files = [Path(entry.path) for entry in call.excinfo.traceback]
        ours = [file for file in files if self.folder in file.parents]
        is_own = call.when == "call" and is_assertion and bool(ours) and ours[-1].parent == self.folder / "tests"
        said = f"{call.excinfo.typename}: {call.excinfo.value}"
        self.verdicts[name] = Verdict(passed=False, by_its_own=is_own, said=said)


def run_tests(tests: list[str], change: Callable[[Path], None] = lambda folder: None) -> dict[str, Verdict]:
    """The verdict of each of some tests in a changed copy of the project, in a forked process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_project(folder)
        change(folder)
        child = os.fork()
        if child == 0:
            signal.alarm(TIMEOUT + TIMEOUT // 12 * (len(tests) - 1))
            run_here(folder, tests)
        os.waitpid(child, 0)
        results = folder / "verdicts.json"
        found = json.loads(results.read_text()) if results.exists() else {}
    missing = Verdict(passed=False, said="it did not end in time, or another stopped before it")
    return {test: Verdict(*found[test]) if test in found else missing for test in tests}


def run_here(folder: Path, tests: list[str]) -> None:
    """Run the tests, leave their verdicts in the folder, and end the process."""
    import pytest

    os.chdir(folder)
    os.dup2(os.open("log.txt", os.O_CREAT | os.O_WRONLY), 1)
    os.dup2(1, 2)
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "tests")]
    watch = Watch(folder)
    pytest.main([*OPTIONS, *tests], plugins=[watch])
    (folder / "verdicts.json").write_text(json.dumps(watch.verdicts))
    os._exit(0)


def run_broken(detail: Detail, change: Break) -> Verdict:
    """What the detail's test does where the detail is broken."""

    def put_in(folder: Path) -> None:
        file = folder / change.file
        _, _, function = detail.parts["Code"].partition(":")
        file.write_text(broken_source(file.read_text(encoding="utf-8"), function, change), encoding="utf-8")

    return run_tests([change.test], put_in)[change.test]


def missing_figures(detail: Detail, said: str) -> list[str]:
    """The detail's figures that are not among the numbers of what its test said, rounded alike."""
    numbers = [float(number) for number in re.findall(NUMBER, said)]
    missing = []
    for figure in detail.figures:
        _, _, decimals = figure.partition(".")
        kind = f".{len(decimals.partition('e')[0])}{'e' if 'e' in figure else 'f'}"
        if not any(float(format(number, kind)) == float(figure) for number in numbers):
            missing.append(figure)
    return missing


def fault(detail: Detail, verdict: Verdict) -> str:
    """What is wrong with how a detail's test took it that the detail was broken; empty if nothing is."""
    told = " ".join(verdict.said.split())[:400]
    if verdict.passed:
        return "its test does not notice"
    if not verdict.by_its_own:
        return f"its test fails by no assertion of its own: {told}"
    missing = missing_figures(detail, verdict.said)
    return f"its test does not say {', '.join(missing)}: {told}" if missing else ""


def prepare() -> None:
    """Import what takes seconds to import, once for all processes that will be forked."""
    os.environ |= ENVIRONMENT | {"HF_HUB_OFFLINE": "1"}
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torchtyping  # noqa: F401
    from transformers import GPT2LMHeadModel, LlamaForCausalLM, T5ForConditionalGeneration  # noqa: F401

    torch.set_num_threads(1)
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))


def faults(numbers: list[int]) -> int:
    """How much is wrong with the details of these numbers, or of all; a line is printed for each detail and fault.

    The tests run as they are in one process, then each by itself where its detail is broken.
    """
    chosen = [detail for detail in details() if detail.number in numbers or not numbers]
    changes = {change.detail: change for change in breaks()}
    count = 0
    tests = sorted({detail.parts["Test"] for detail in chosen})
    for test, verdict in run_tests(tests).items():
        if not verdict.passed:
            count += 1
            print(f"{test} fails on the code as it is: {verdict.said[:300]}")
    for detail in chosen:
        verdict = run_broken(detail, changes[detail.number])
        problem = fault(detail, verdict)
        count += bool(problem)
        print(f"{detail.number}. {detail.title} {problem or 'noticed'}", flush=True)
        if numbers:
            print(verdict.said)
    return count


if __name__ == "__main__":
    prepare()
    sys.exit(min(1, faults([int(number) for number in sys.argv[1:]])))
