"""`--log_with`: a run's settings, statistics and samples go to a tracker as well, one that the user named.

A tracker is imported where it is asked for. Once the run has begun, nothing that a tracker does can end it.
"""

import dataclasses
import importlib
import io
import os
import shlex
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

from config import Config, UsageError, first_line, to_json
from files import write_whole
from progress import say

PROJECT = "ppo"
TENSORBOARD = "torch.utils.tensorboard"  # what writes for it: tensorboard itself only shows
ENVIRONMENT = {  # each tracker's own settings, where the user's environment has none; {folder} is the run's
    "wandb": {
        "WANDB_DIR": "{folder}",
        "WANDB_DATA_DIR": "{folder}/wandb",
        "WANDB_SILENT": "true",
        "WANDB_FINISH_TIMEOUT": "60",  # seconds, else it waits for a network that is gone for as long as it is gone
        "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "1",  # seconds, of what the run has lost if it is killed
        # nothing is sent but what it is given
        "WANDB_CONSOLE": "off",
        "WANDB_DISABLE_CODE": "true",
        "WANDB_DISABLE_GIT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB__DISABLE_MACHINE_INFO": "true",
        "WANDB__DISABLE_STATS": "true",
        "WANDB__SAVE_REQUIREMENTS": "false",
    },
    "trackio": {"TRACKIO_DIR": "{folder}/trackio"},
    "swanlab": {
        "SWANLAB_LOG_DIR": "{folder}/swanlab",
        "SWANLAB_INTERACTIVE": "false",
        "SWANLAB_TERMINAL_PROXY_TYPE": "none",
        "SWANLAB_PROBE_HARDWARE": "false",
        "SWANLAB_PROBE_RUNTIME": "false",
        "SWANLAB_PROBE_REQUIREMENTS": "false",
        "SWANLAB_PROBE_GIT": "false",
        "SWANLAB_PROBE_SWANLAB": "false",
        "SWANLAB_PROBE_MONITOR": "false",
    },
}


class Table(NamedTuple):
    columns: list[str]
    rows: list[list]


class Tracker(NamedTuple):
    """A tracker that is open: what it is told of an update, of the samples at the end, and that the run is over."""

    log: Callable[[int, dict[str, float]], None]
    log_samples: Callable[[int, Table], None]
    finish: Callable[[bool], None]  # of a run that has failed?
    place: str  # where to look


class Tracking(NamedTuple):
    """What the run calls: with an update's number, and its log row or the samples of a comparison."""

    log: Callable[[int, dict], None]
    log_samples: Callable[[int, list[dict]], None]


NO_TRACKING = Tracking(log=lambda update, row: None, log_samples=lambda update, samples: None)


def check_tracker(config: Config, folder: Path) -> None:
    """Raise UsageError if --log_with names what is not installed, or a service that nobody is logged in to.

    Nothing is written, and no network asked. The tracker is left set up for a run in the folder.
    """
    name = config.log_with
    if not name:
        return
    for variable, value in ENVIRONMENT.get(name, {}).items():
        os.environ.setdefault(variable, value.format(folder=folder.absolute()))
    try:
        module = importlib.import_module(TENSORBOARD if name == "tensorboard" else name)
        has_login = not needs_login(name, module)
    except ImportError as error:
        raise UsageError(f"--log_with {name} cannot be used ({first_line(error)}): pip install {name}") from None
    except Exception as error:  # whatever a package does where it cannot work
        raise UsageError(f"--log_with {name} cannot be used: {' '.join(str(error).split())[:300]}") from None
    if not has_login:
        raise UsageError(
            f"--log_with {name}: nobody is logged in; run `{name} login`, or set {name.upper()}_API_KEY, "
            f"or {name.upper()}_MODE=offline to keep all in the run's folder"
        )


def needs_login(name: str, module) -> bool:
    """Whether the tracker sends to a service for which there is no key here."""
    if name == "wandb":
        return module.setup().settings.mode == "online" and not module.login(prompt=False, verify=False)
    if name == "swanlab":
        settings = module.Settings()
        return settings.mode == "online" and not settings.api_key
    return False


@contextmanager
def tracking(config: Config, folder: Path, first_update: int) -> Iterator[Tracking]:
    """Yield what tells the tracker of --log_with of updates from `first_update` on, and of samples.

    It is opened when there is something to tell, so that the run has claimed its folder, and finished with the block.
    Where it fails, that is said, and it is told no more.
    """
    if not config.log_with:
        yield NO_TRACKING
        return
    tracker, works, has_failed = None, True, True

    def attempt(tell: Callable[[Tracker], None]) -> None:
        nonlocal tracker, works
        if not works:
            return
        try:
            with undisturbed():
                is_new = tracker is None
                tracker = tracker or OPENERS[config.log_with](config, folder, first_update)
                tell(tracker)
        except Exception as error:
            works = False
            say(f"warning: {config.log_with} failed, and is told no more; the run goes on: {first_line(error)}")
        else:
            if is_new:
                say(f"{config.log_with} follows this run: {tracker.place}")

    try:
        yield Tracking(
            log=lambda update, row: attempt(lambda tracker: tracker.log(update, numbers_of(row))),
            log_samples=lambda update, samples: attempt(lambda tracker: tracker.log_samples(update, table_of(samples))),
        )
        has_failed = False
    finally:
        if tracker:
            attempt(lambda tracker: tracker.finish(has_failed))


@contextmanager
def undisturbed() -> Iterator[None]:
    """What a tracker prints is not shown, and a signal that it takes for itself is given back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def numbers_of(row: dict) -> dict[str, float]:
    """The numbers of a log row, but for the update's own, which a tracker is told apart."""
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}


def table_of(samples: list[dict]) -> Table:
    """The prompts, every policy's responses to them, and the rewards."""
    columns = [name for name in samples[0] if name == "query" or name.startswith(("response_", "reward_"))]
    return Table(columns, [[row[name] for name in columns] for row in samples])


def run_id(folder: Path) -> str:
    """The run's name for services, by which it is found again when it goes on; kept in its folder."""
    path = folder / "tracker_id.txt"
    if not path.exists():
        write_whole(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8")


def as_markdown(table: Table) -> str:
    """A table in Markdown. Every sign of a text is written so that it stands for itself."""

    def line(cells: list) -> str:
        return "|" + "|".join(as_cell(cell) for cell in cells) + "|"

    rule = "|" + "---|" * len(table.columns)
    return "\n".join([line(table.columns), rule, *map(line, table.rows)])


def as_cell(value) -> str:
    """Letters, digits and spaces as they are, anything else by its number: no markup, and no end of a line or cell."""
    return "".join(sign if sign.isalnum() or sign == " " else f"&#{ord(sign)};" for sign in str(value))


def open_tensorboard(config: Config, folder: Path, first_update: int) -> Tracker:
    """Event files in `tensorboard/`. What an earlier process wrote of `first_update` and later ones is taken back."""
    from torch.utils.tensorboard import SummaryWriter

    place = str(folder / "tensorboard")
    writer = SummaryWriter(place, purge_step=first_update)
    writer.add_text("settings", indent(to_json(config), "    "), first_update)  # which Markdown leaves as it is

    def log(update: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, update)
        writer.flush()

    return Tracker(
        log=log,
        log_samples=lambda update, table: writer.add_text("samples", as_markdown(table), update),
        finish=lambda has_failed: writer.close(),
        place=f"tensorboard --logdir {shlex.quote(place)}",
    )


def open_wandb(config: Config, folder: Path, first_update: int) -> Tracker:
    """An update that it has already, it does not take again."""
    import wandb

    run = wandb.init(
        project=PROJECT, name=str(folder), config=dataclasses.asdict(config), id=run_id(folder), resume="allow"
    )

    def log_samples(update: int, table: Table) -> None:
        # not in the history, where it would be an update of its own, and the next one be dropped for it
        run.summary["samples"] = wandb.Table(columns=table.columns, data=table.rows)

    return Tracker(
        log=lambda update, numbers: run.log(numbers, step=update, commit=True),
        log_samples=log_samples,
        finish=lambda has_failed: run.finish(exit_code=int(has_failed)),
        place=run.url or str(folder / "wandb"),
    )


def open_trackio(config: Config, folder: Path, first_update: int) -> Tracker:
    """A local store, in `trackio/`, unless the environment names another or a server."""
    import trackio

    run = trackio.init(
        project=PROJECT,
        name=str(folder),
        config=dataclasses.asdict(config),
        resume="allow" if first_update else "never",
        embed=False,
        auto_log_cpu=False,
        auto_log_gpu=False,
    )
    return Tracker(
        log=lambda update, numbers: run.log(numbers, step=update),
        log_samples=lambda update, table: run.log(
            {"samples": trackio.Table(columns=table.columns, data=table.rows)}, step=update
        ),
        finish=lambda has_failed: trackio.finish(),  # the run's own would have it finished again at exit
        place=run.url or f"TRACKIO_DIR={shlex.quote(os.environ['TRACKIO_DIR'])} trackio show --project {PROJECT}",
    )


def open_swanlab(config: Config, folder: Path, first_update: int) -> Tracker:
    import swanlab

    run = swanlab.init(
        project=PROJECT, name=str(folder), config=dataclasses.asdict(config), id=run_id(folder), resume="allow"
    )

    def log_samples(update: int, table: Table) -> None:
        chart = swanlab.echarts.Table()
        chart.add(table.columns, table.rows)
        run.log({"samples": chart}, step=update)

    return Tracker(
        log=lambda update, numbers: run.log(numbers, step=update),
        log_samples=log_samples,
        finish=lambda has_failed: run.finish("crashed" if has_failed else "success"),
        place=run.url if run.mode == "online" else str(folder / "swanlab"),
    )


OPENERS = {"tensorboard": open_tensorboard, "wandb": open_wandb, "trackio": open_trackio, "swanlab": open_swanlab}
