"""A tracker is told what the run logs, and nothing that it does can cost the run anything."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import re
import signal
import sqlite3
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import yaml
from helpers import read_stats
from micro import PPO, assert_refused, flags, listing, run_main
from test_run import SMALL
from test_train import QUERIES, fixed_for, prompts_of, settings
from tiny_models import tiny_gpt2

import main
import run
import trackers
from arguments import is_read
from config import TASKS, TRACKERS, Config, RunError
from model import PolicyModel
from progress import visible
from trackers import as_cell, check_tracker, numbers_of, table_of, tracking
from train import new_state

pytest_plugins = ["micro"]
pytestmark = pytest.mark.usefixtures("no_figures")

SERVICES = ["wandb", "trackio", "swanlab"]
SAMPLES = [
    {"query": "a|b", "response_before": "x\ny", "response_after": "<b>", "kl_after": 0.5, "reward_after": -1.5},
    {"query": "c", "response_before": "", "response_after": "é", "kl_after": 0.5, "reward_after": 2.0},
]
COLUMNS = ["query", "response_before", "response_after", "reward_after"]
ROWS = [["a|b", "x\ny", "<b>", -1.5], ["c", "", "é", 2.0]]


@pytest.fixture(autouse=True)
def own_environment():
    """What a tracker's settings put there is gone after the test; and none is there that would send something."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("WANDB_", "TRACKIO_", "SWANLAB_")):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


def track_a_run(folder: Path, config: Config, samples: list[dict] = SAMPLES) -> list[dict]:
    """Updates on letters, and samples; the rows of training_stats.jsonl."""
    folder.mkdir(exist_ok=True)
    check_tracker(config, folder)
    policy, prompts = PolicyModel(tiny_gpt2()), prompts_of(QUERIES)
    with tracking(config, folder, first_update=0) as tracker:
        fixed = fixed_for(policy)
        state = new_state(policy, config)
        began = run.what_it_began_with(fixed, config)
        run.run_updates(state, fixed, run.Prompts(prompts, prompts, prompts), config, folder, began, tracker)
        tracker.log_samples(config.n_updates - 1, samples)
    return read_stats(folder)


def expected_numbers(rows: list[dict]) -> dict[int, dict[str, float]]:
    """By update, what a tracker is to be told of each: all but its number and the alarms, which are texts."""
    return {row["step"]: {name: row[name] for name in row if name not in ("step", "alarms")} for row in rows}


# ----------------------------------------------------------------------------------------------------------------
# Tensorboard
# ----------------------------------------------------------------------------------------------------------------


class Events(NamedTuple):
    """What is in event files: by update, its numbers; and texts by name, each with its update."""

    numbers: dict[int, dict[str, float]]
    texts: dict[str, list[tuple[int, str]]]


def read_events(folder: Path) -> Events:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    numbers: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in numbers.setdefault(event.step, {}), f"{name} of update {event.step} is there twice"
            numbers[event.step][name] = event.value
    texts = {}
    for tag in events.Tags()["tensors"]:
        found = events.Tensors(tag)
        texts[tag.removesuffix("/text_summary")] = [
            (event.step, event.tensor_proto.string_val[0].decode()) for event in found
        ]
    return Events(numbers, texts)


def assert_equal_in_float32(found: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> None:
    assert found.keys() == expected.keys()
    for update, numbers in expected.items():
        assert found[update] == pytest.approx(numbers, rel=1e-6, nan_ok=True)


def decoded(cell: str) -> str:
    """The text of a cell; `html.unescape` leaves control characters out, as a browser does."""
    return re.sub(r"&#(\d+);", lambda found: chr(int(found[1])), cell)


def table_in(markdown: str) -> list[list[str]]:
    """The cells of a table in Markdown, its heading first."""
    heading, _, *rows = markdown.splitlines()
    return [[decoded(cell) for cell in line.strip("|").split("|")] for line in (heading, *rows)]


def test_the_event_file_of_a_run_has_its_statistics_settings_and_samples(workplace, capsys):
    """From the command line, with what the run says of itself as the oracle."""
    assert run_main("--task", "train", "--log_with", "tensorboard", "--eval_every", "2", *flags(n_updates=3)) == 0
    said = capsys.readouterr().out
    folder = Path(f"{PPO}-2")
    assert f"tensorboard follows this run: tensorboard --logdir {folder / 'tensorboard'}\n" in said
    events = read_events(folder / "tensorboard")
    rows = read_stats(folder)
    assert_equal_in_float32(events.numbers, expected_numbers(rows))
    assert [("eval_reward" in numbers) for numbers in events.numbers.values()] == [False, True, True]

    ((update, text),) = events.texts["settings"]
    assert update == 0
    assert json.loads(textwrap.dedent(text)) == json.loads((folder / "run_config.json").read_text())

    ((update, text),) = events.texts["samples"]
    heading, *samples = table_in(text)
    assert update == 2 and len(samples) == 4  # of as many held-out prompts
    shown = [visible(as_printed(dict(zip(heading, row, strict=True)))) in said for row in samples]
    assert sum(shown) == 3


def as_printed(sample: dict[str, str]) -> str:
    """A row of the sample table as the run's end shows it."""
    before, after = float(sample["reward_before"]), float(sample["reward_after"])
    return (
        f"prompt  {sample['query']!r}\n  before ({before:+.2f}) {sample['response_before'].strip()}\n"
        f"  after  ({after:+.2f}) {sample['response_after'].strip()}\n"
    )


def test_a_run_that_goes_on_continues_its_curves(tmp_path):
    """Updates 0 to 4 of a process that was killed at its checkpoint after 2, and 2 to 5 of the next."""
    config = settings(log_with="tensorboard")
    for first, last, reward in ((0, 5, 1.0), (2, 6, 7.0)):
        with tracking(config, tmp_path, first_update=first) as tracker:
            for update in range(first, last):
                tracker.log(update, {"step": update, "reward": reward + update, "alarms": []})
    found = read_events(tmp_path / "tensorboard").numbers
    assert {update: numbers["reward"] for update, numbers in found.items()} == {0: 1, 1: 2, 2: 9, 3: 10, 4: 11, 5: 12}


def test_every_update_is_in_the_event_file_when_it_is_over(tmp_path, monkeypatch):
    """So that a run that is killed has lost none, even where the disk is slow."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    write = RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", lambda own, data: (time.sleep(0.1), write(own, data)))
    with tracking(settings(log_with="tensorboard"), tmp_path, first_update=0) as tracker:
        for update in range(3):
            tracker.log(update, {"reward": 0.5 * update})
            assert read_events(tmp_path / "tensorboard").numbers[update] == {"reward": 0.5 * update}


@pytest.mark.parametrize(
    "text", ["a|b", "two\nlines\r\n", "<script>x</script>", "**b** `c` [d](e) # &amp;", "\x1b[1m", ""]
)
def test_a_text_in_a_table_stands_for_itself(text):
    assert decoded(as_cell(text)) == text
    assert not set(as_cell(text)) & set("|\n\r\x1b<>*`[]\\_")


# ----------------------------------------------------------------------------------------------------------------
# Services whose interfaces are alike, by stand-ins of them
# ----------------------------------------------------------------------------------------------------------------


class StandIn:
    """A service that notes what it is told, and fails where it is to; it prints, and takes signals for itself."""

    def __init__(self, name: str, fails_in: str = "") -> None:
        self.name = name
        self.fails_in = fails_in
        self.calls: list[str] = []
        self.settings: dict = {}
        self.numbers: dict[int, dict[str, float]] = {}
        self.samples: list = []
        self.endings: list = []

    def called(self, what: str) -> None:
        self.calls.append(what)
        print(f"{self.name} has a new version! {what}")
        signal.signal(signal.SIGINT, lambda *_: None)
        if what == self.fails_in:
            raise OSError(f"no route\nto {self.name}")

    def init(self, **settings):
        self.called("init")
        self.settings = settings
        own = SimpleNamespace(log=self.log, finish=self.finish, url=None, mode="offline", summary=Summary(self))
        return own

    def log(self, values: dict, step: int, commit: bool = False) -> None:
        if "samples" in values:
            return self.log_samples(values["samples"])
        self.called("log")
        assert commit == (self.name == "wandb")
        assert step not in self.numbers
        self.numbers[step] = values

    def log_samples(self, table) -> None:
        self.called("log_samples")
        self.samples.append((table.columns, table.data))

    def finish(self, state: str = "", exit_code: int | None = None) -> None:
        self.called("finish")
        self.endings.append(state or exit_code)


class Summary:
    def __init__(self, service: StandIn) -> None:
        self.service = service

    def __setitem__(self, name: str, table) -> None:
        assert name == "samples"
        self.service.log_samples(table)


class StandInTable:
    def __init__(self, columns=None, data=None) -> None:
        self.columns, self.data = columns, data

    add = __init__


def stand_in(monkeypatch, name: str, fails_in: str = "", key: str | None = "a key", mode: str = "online") -> StandIn:
    """Put a stand-in where `import` finds it."""
    service, module = StandIn(name, fails_in), ModuleType(name)
    module.init, module.finish = service.init, service.finish
    module.Table, module.echarts = StandInTable, SimpleNamespace(Table=StandInTable)
    module.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode))
    module.login = lambda prompt, verify: bool(key or prompt or verify)
    module.Settings = lambda: SimpleNamespace(mode=mode, api_key=key)
    monkeypatch.setitem(sys.modules, name, module)
    return service


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_told_what_is_logged(name, tmp_path, monkeypatch):
    service = stand_in(monkeypatch, name)
    config = settings(log_with=name, n_updates=2, **SMALL)
    rows = track_a_run(tmp_path / "run", config)
    assert service.numbers == expected_numbers(rows)
    assert service.settings["config"] == dataclasses.asdict(config)
    assert service.settings["name"] == str(tmp_path / "run")
    assert service.samples == [(COLUMNS, ROWS)]
    assert service.calls == ["init", "log", "log", "log_samples", "finish"]
    assert service.endings == {"wandb": [0], "trackio": [None], "swanlab": ["success"]}[name]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_told_that_the_run_has_failed(name, tmp_path, monkeypatch):
    service, config = stand_in(monkeypatch, name), settings(log_with=name)
    check_tracker(config, tmp_path)
    with pytest.raises(RunError), tracking(config, tmp_path, first_update=0) as tracker:
        tracker.log(0, {"reward": 1.0})
        raise RunError("the disk is full")
    assert service.calls == ["init", "log", "finish"]
    assert service.endings == {"wandb": [1], "trackio": [None], "swanlab": ["crashed"]}[name]


@pytest.mark.parametrize(
    ("fails_in", "calls"),
    [
        ("init", ["init"]),
        ("log", ["init", "log"]),
        ("log_samples", ["init", "log", "log", "log_samples"]),
        ("finish", ["init", "log", "log", "log_samples", "finish"]),
    ],
)
def test_a_service_that_fails_is_told_of_once_and_costs_the_run_nothing(fails_in, calls, tmp_path, monkeypatch, capsys):
    service = stand_in(monkeypatch, "wandb", fails_in)
    rows = track_a_run(tmp_path / "tracked", settings(log_with="wandb", n_updates=2, **SMALL))
    said = capsys.readouterr().out
    assert said.count("warning: wandb failed, and is told no more; the run goes on: no route\n") == 1
    assert said.count("warning") == 1
    assert service.calls == calls
    assert rows == track_a_run(tmp_path / "alone", settings(n_updates=2, **SMALL))


def test_a_tensorboard_that_fails_costs_the_run_nothing(tmp_path, capsys):
    """By a file where its folder would be."""
    policy, prompts = PolicyModel(tiny_gpt2()), prompts_of(QUERIES)
    config = settings(log_with="tensorboard", n_updates=2, **SMALL)
    with tracking(config, tmp_path / "run", first_update=0) as tracker:

        def log(update: int, row: dict) -> None:
            if update == 0:
                (tmp_path / "run/tensorboard").write_text("")
            tracker.log(update, row)

        told = tracker._replace(log=log)
        own, fixed = run.Prompts(prompts, prompts, prompts), fixed_for(policy)
        (tmp_path / "run").mkdir()
        began = run.what_it_began_with(fixed, config)
        run.run_updates(new_state(policy, config), fixed, own, config, tmp_path / "run", began, told)
    assert len(read_stats(tmp_path / "run")) == 2
    assert capsys.readouterr().out.count("warning: tensorboard failed, and is told no more; the run goes on: ") == 1


def test_what_a_service_prints_is_not_shown_and_signals_are_given_back(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, "swanlab")
    before = signal.getsignal(signal.SIGINT)
    track_a_run(tmp_path / "run", settings(log_with="swanlab", n_updates=1, **SMALL))
    assert signal.getsignal(signal.SIGINT) is before
    said = capsys.readouterr()
    assert said.out == f"swanlab follows this run: {tmp_path / 'run/swanlab'}\n"
    assert said.err.startswith("PPO: 1/1 ") and said.err.count("\n") == 1


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_run_is_found_again_by_its_folder(name, tmp_path, monkeypatch):
    """And a new run by no name that an earlier one had, even in its place."""
    names = []
    for folder in ("one", "one", "two"):
        service = stand_in(monkeypatch, name)
        (tmp_path / folder).mkdir(exist_ok=True)
        with tracking(settings(log_with=name), tmp_path / folder, first_update=0) as tracker:
            tracker.log(0, {"reward": 1.0})
        assert service.settings["resume"] == "allow"
        names.append(service.settings["id"])
    assert names[0] == names[1] != names[2]


def test_a_run_of_trackio_is_found_again_by_its_name_where_it_goes_on(tmp_path, monkeypatch):
    service = stand_in(monkeypatch, "trackio")
    check_tracker(settings(log_with="trackio"), tmp_path)
    for first_update, resume in ((0, "never"), (3, "allow")):
        with tracking(settings(log_with="trackio"), tmp_path, first_update) as tracker:
            tracker.log(first_update, {"reward": 1.0})
        assert (service.settings["resume"], service.settings["name"]) == (resume, str(tmp_path))


def test_settings_of_the_users_own_environment_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", "/of/the/user")
    for name in ("trackio", "wandb"):
        stand_in(monkeypatch, name)
        check_tracker(settings(log_with=name), tmp_path)
    assert os.environ["TRACKIO_DIR"] == "/of/the/user"
    assert os.environ["WANDB_DIR"] == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_numbers_alone_are_sent_and_those_that_are_none_too():
    row = {"step": 3, "reward": 0.5, "count": 2, "kl": math.nan, "alarms": ["the reward fell"], "note": "text"}
    assert repr(numbers_of(row)) == repr({"reward": 0.5, "count": 2, "kl": math.nan})
    assert table_of(SAMPLES) == (COLUMNS, ROWS)


# ----------------------------------------------------------------------------------------------------------------
# What is refused before any work, and what is not asked for
# ----------------------------------------------------------------------------------------------------------------


def test_every_tracker_there_is_can_be_opened():
    assert set(trackers.OPENERS) == set(TRACKERS) - {""}


def new_run(name: str) -> list[str]:
    """A run whose stages are yet to be trained."""
    return ["--task", "train", "--log_with", name, "--run_name", "new", *flags()]


def test_a_tracker_that_there_is_not_is_refused_with_the_nearest(empty, capsys):
    words = "--log_with 'tensorbord' is not one of tensorboard, wandb, trackio, swanlab; did you mean tensorboard?"
    assert_refused(capsys, empty, new_run("tensorbord"), words)


@pytest.mark.parametrize("name", ["tensorboard", *SERVICES])
def test_a_tracker_that_is_not_installed_is_refused_before_any_work(name, empty, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    assert_refused(capsys, empty, new_run(name), f"--log_with {name} cannot be used (", f"): pip install {name}")


def test_a_tracker_that_cannot_be_imported_is_refused_before_any_work(empty, monkeypatch, capsys):
    """As one whose own packages do not fit each other."""
    (empty / "modules").mkdir()
    (empty / "modules/wandb.py").write_text("raise TypeError('Descriptors cannot be created directly.\\nMore')")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(empty / "modules"))
    words = "--log_with wandb cannot be used: Descriptors cannot be created directly. More"
    assert_refused(capsys, empty, new_run("wandb"), words)


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_service_that_nobody_is_logged_in_to_is_refused_before_any_work(name, empty, monkeypatch, capsys):
    stand_in(monkeypatch, name, key=None)
    words = f"nobody is logged in; run `{name} login`, or set {name.upper()}_API_KEY, or {name.upper()}_MODE=offline"
    assert_refused(capsys, empty, new_run(name), words)


@pytest.mark.parametrize(("name", "mode"), [("wandb", "offline"), ("wandb", "disabled"), ("swanlab", "offline")])
def test_nobody_need_be_logged_in_where_nothing_is_sent(name, mode, tmp_path, monkeypatch):
    stand_in(monkeypatch, name, key=None, mode=mode)
    check_tracker(settings(log_with=name), tmp_path)


def test_training_alone_is_tracked():
    assert [task for task in TASKS if is_read(Config.__dataclass_fields__["log_with"], task)] == ["train"]


def test_nothing_is_tracked_that_was_not_asked_for(tmp_path, monkeypatch, capsys):
    services = [stand_in(monkeypatch, name) for name in SERVICES]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    before = dict(os.environ)
    track_a_run(tmp_path / "run", settings(n_updates=1, **SMALL))
    assert capsys.readouterr().out == ""
    assert [service.calls for service in services] == [[], [], []]
    assert dict(os.environ) == before
    names = {"training_log.csv", "training_stats.jsonl", "timings.jsonl"}
    assert names <= set(listing(tmp_path / "run"))
    assert not any("track" in name or "board" in name for name in listing(tmp_path / "run"))


# ----------------------------------------------------------------------------------------------------------------
# The services themselves, with nothing sent
# ----------------------------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """What a service has kept of a run."""

    numbers: dict[int, dict[str, float]]
    settings: dict
    samples: list[dict]


@pytest.fixture
def tracked(workplace, tmp_path_factory, monkeypatch) -> Callable[[str], Path]:
    """Track a run from the command line by a service that is told to send nothing; its folder. Nothing of it is left
    elsewhere in the folder where the command ran, and none of it is advertised.
    """

    def track(name: str) -> Path:
        pytest.importorskip(name, reason=f"{name} is not installed: pip install {name}")
        offline = {"HOME": str(tmp_path_factory.mktemp("home")), f"{name.upper()}_MODE": "offline"}
        before = set(listing(workplace))
        command = [sys.executable, main.__file__, "--task", "train", "--log_with", name, *flags(n_updates=3)]
        done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        folder = Path(f"{PPO}-2")
        assert all(path.startswith(str(folder)) for path in set(listing(workplace)) - before)
        said = [line for line in (done.stdout + done.stderr).splitlines() if name in line.lower()]
        assert len(said) == 2, said  # settings, and where the run is
        assert said[0].startswith("settings: ") and said[1].startswith(f"{name} follows this run: ")
        return folder

    return track


def assert_kept(kept: Kept, folder: Path) -> None:
    """What is to be kept, and nothing of the machine, the command or the packages, but in logs that are not sent."""
    files = [path for name in SERVICES for path in (folder / name).rglob("*") if path.is_file()]
    stored = b"".join(path.read_bytes() for path in files if path.suffix != ".log")
    assert not [word for word in (platform.release(), "--log_with", "transformers==") if word.encode() in stored]
    assert kept.numbers == expected_numbers(read_stats(folder))
    assert kept.settings == json.loads((folder / "run_config.json").read_text(encoding="utf-8"))
    assert len(kept.samples) == 4  # of as many held-out prompts
    assert {"query", "response_before", "response_after", "reward_before", "reward_after"} <= kept.samples[0].keys()


def records_in(path: Path) -> Iterator[bytes]:
    """The records of a log of LevelDB's kind, of which both wandb and swanlab have one: 7 bytes, then blocks of 32 kB
    with parts of records, each behind a checksum, its length, and whether it is all, first, middle or last.
    """
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, part = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4):
            yield record
            record = b""


@pytest.mark.slow
def test_wandb_keeps_a_run_offline(tracked):
    folder = tracked("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    kept, summary = Kept({}, {}, []), {}
    for record in map(Record.FromString, records_in(path)):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            kept.numbers[row["_step"]] = {name: row[name] for name in row if not name.startswith("_")}
        for item in record.run.config.update:
            kept.settings[item.key or item.nested_key[0]] = json.loads(item.value_json)
        for item in record.summary.update:
            summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        assert record.exit.exit_code == 0
    kept.settings.pop("_wandb", None)
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/*.json")
    content = json.loads(table.read_text())
    kept.samples.extend(dict(zip(content["columns"], row, strict=True)) for row in content["data"])
    assert_kept(kept, folder)
    assert table.name in str(summary["samples"])


@pytest.mark.slow
def test_trackio_keeps_a_run_in_its_folder(tracked):
    folder = tracked("trackio")
    with contextlib.closing(sqlite3.connect(folder / "trackio/ppo.db")) as store:
        rows = store.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
        ((settings_kept,),) = store.execute("SELECT config FROM configs").fetchall()
    kept = Kept({}, json.loads(settings_kept), [])
    for step, text in rows:
        numbers = json.loads(text)
        if "samples" in numbers:
            kept.samples.extend(numbers["samples"]["_value"])
        else:
            assert step not in kept.numbers
            kept.numbers[step] = numbers
    for name in [name for name in kept.settings if name.startswith("_")]:
        del kept.settings[name]
    assert_kept(kept, folder)


@pytest.mark.slow
def test_swanlab_keeps_a_run_offline(tracked):
    folder = tracked("swanlab")
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    (path,) = folder.glob("swanlab/run-*/run-*.swanlab")
    kept = Kept({}, {}, [])
    for record in map(Record.FromString, records_in(path)):
        if record.HasField("scalar"):
            kept.numbers.setdefault(record.scalar.step, {})[record.scalar.key] = record.scalar.value.number
    (config,) = folder.glob("swanlab/run-*/files/config.yaml")
    for name, entry in yaml.safe_load(config.read_text(encoding="utf-8")).items():
        kept.settings[name] = entry["value"]
    (table,) = folder.glob("swanlab/run-*/media/echarts/*.json")
    kept.samples.extend(json.loads(table.read_text(encoding="utf-8"))["rowData"])
    assert_kept(kept, folder)
