"""What a stage keeps of its data: which rows it was trained on, to be compared with the rows at hand.

A row is known by a hash of its values in the columns that were read. `rows.txt` holds that of every row, sorted, and
`stage.json` their number and the hash of all (that of the file), what was held out, the figures on it, and which
weights the stage started from: paths alone say nothing of what they held.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import Config, UsageError, template_fields
from dataset import LOOKED_AT, PARTS, load_rows, most_texts
from files import read_object, write_whole
from folders import run_above, trained_stage
from progress import say
from rows import Rows

RECORD = "stage.json"
ROWS = "rows.txt"


class Source(NamedTuple):
    """What a stage was made from."""

    columns: list[str]  # those of the rows that it read
    rows: Sequence[dict]
    held_out: Sequence[dict]
    start: str = ""  # folder or id of the model it started from; none: random weights


def columns_read(config: Config, row: dict, *others: str) -> list[str]:
    """The columns that a stage reads, of those that there are: the prompt's, and the others named."""
    fields = template_fields(config.prompt_template) if config.prompt_template else []
    names = dict.fromkeys([config.prompt_column, *fields, *others])
    return [name for name in names if name in row]


def row_hash(row: dict, columns: list[str]) -> int:
    """64 bits for a row's values in the columns."""
    values = json.dumps([row.get(name) for name in columns], default=str)
    return int.from_bytes(hashlib.blake2b(values.encode(), digest_size=8).digest())


def row_hashes(rows: Sequence[dict], columns: list[str]) -> np.ndarray:
    """Every row's hash, sorted: the order of the rows says nothing. Eight bytes each, they may be ten million."""
    if isinstance(rows, Rows):
        rows = rows.only(columns).in_file_order()  # where many are, that is quicker
    hashes = np.fromiter((row_hash(row, columns) for row in rows), np.uint64, count=len(rows))
    hashes.sort()
    return hashes


def rows_text(hashes: np.ndarray) -> str:
    """A line of hexadecimal digits for each."""
    return hashes.astype(">u8").tobytes().hex("\n", 8) + "\n" * (len(hashes) > 0)


def fingerprint(hashes: np.ndarray) -> dict:
    """How many rows, and one hash for all of them."""
    return {"rows": len(hashes), "sha256": hashlib.sha256(rows_text(hashes).encode()).hexdigest()}


def weights_hash(path: str) -> str:
    """One hash for all weights of the model in a folder; empty for what is no folder, such as a Hub id."""
    total = hashlib.sha256()
    folder = Path(path)
    files = [*folder.glob("model*.safetensors"), *folder.glob("adapter_model*")] or folder.glob("pytorch_model*.bin")
    for file in sorted(files):
        with file.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest() if path and Path(path).is_dir() else ""


def write_record(folder: Path, source: Source, **figures: float) -> None:
    """Leave in the folder what the stage was trained on, what was held out, and the figures on that."""
    hashes = row_hashes(source.rows, source.columns)
    held_out = fingerprint(row_hashes(source.held_out, source.columns))
    record = {
        "trained_on": {"columns": source.columns} | fingerprint(hashes),
        "starts_from": {"path": source.start, "sha256": weights_hash(source.start)},
        "held_out": held_out | figures,
    }
    write_whole(folder / ROWS, rows_text(hashes))
    write_whole(folder / RECORD, json.dumps(record, indent=2))


def read_record(folder: Path) -> dict:
    """What `write_record` left in the folder, or nothing. Raises UsageError if it is damaged."""
    path = folder / RECORD
    if not path.exists():
        return {}
    record = read_object(path)
    parts = {"trained_on": ("columns", "rows", "sha256"), "starts_from": ("path", "sha256"), "held_out": ("rows",)}
    for part, names in parts.items():
        if not all(name in record.get(part, {}) for name in names) or not (folder / ROWS).is_file():
            raise UsageError(f"{path} is no record of a stage's rows: it lacks {part}, or {ROWS} beside it")
    return record


def read_hashes(folder: Path) -> np.ndarray:
    """What stands in the folder's `rows.txt`. Raises UsageError if that is damaged."""
    try:
        return np.frombuffer(bytes.fromhex((folder / ROWS).read_text(encoding="utf-8")), ">u8").astype(np.uint64)
    except ValueError:
        raise UsageError(f"{folder / ROWS} is damaged: it does not hold 16 hexadecimal digits a line") from None


def usable_stage(config: Config, path: str, stage: str, part: str = "train") -> bool:
    """Whether the stage's folder is there, and this run may use it: then it is said what it is.

    Raises UsageError if it was trained by other settings, on other rows than the data has in that part now, or from
    other weights than are there now.
    """
    if not trained_stage(config, path, stage):
        return False
    record = read_record(Path(path))
    if not record:
        print(f"note: {path} does not say on which rows it was trained; some may be held out now, to judge it by")
        return True
    check_starting_weights(path, record["starts_from"])
    check_rows(config, path, record["trained_on"], stage, part)
    say(described(path, record))
    return True


def has_other_start(start: dict[str, str]) -> bool:
    """Whether the weights that a stage started from have given way to others."""
    return start["sha256"] != "" and weights_hash(start["path"]) not in ("", start["sha256"])


def check_starting_weights(path: str, start: dict[str, str]) -> None:
    """Raise UsageError if the stage started from weights that are not there any more, but others."""
    if has_other_start(start):
        raise UsageError(
            f"{path} was trained from {start['path']}, whose weights are others now: move {path} away, to have it "
            "trained anew, or give a --run_name of its own to this run"
        )


def other_start(run: Path) -> list[str]:
    """A sentence if the weights that a run started from have given way to others, with which it would be compared."""
    record = read_record(run)
    if record and has_other_start(record["starts_from"]):
        return [f"note: {run} was trained from {record['starts_from']['path']}, whose weights are others now"]
    return []


def check_rows(config: Config, path: str, trained_on: dict, stage: str, part: str) -> None:
    """Raise UsageError, which counts what differs, unless the data still has for the stage what it was trained on."""
    own = trained_on["rows"]  # of more than are looked at: as many as its own steps took
    limit = own if own >= LOOKED_AT else most_texts(config, stage)
    now = row_hashes(load_rows(config, part, limit), trained_on["columns"])
    if fingerprint(now)["sha256"] == trained_on["sha256"]:
        return
    before = read_hashes(Path(path))
    others = {}
    for other in PARTS:
        if other != part:
            hashes = row_hashes(load_rows(config, other), trained_on["columns"])
            others[other] = np.isin(hashes, before).sum()
    moved = ", ".join(f"{other} has {count:,} now" for other, count in others.items() if count)
    same = f"{len(np.intersect1d(before, now)):,} of them the same" + (moved and f"; of the old ones {moved}")
    own_name = "" if part == "judge" else ", or a --run_name of its own to this run"
    raise UsageError(
        f"{path} was trained on {trained_on['rows']:,} rows, and {config.dataset_path or 'the built-in data'} now has "
        f"{len(now):,} for it, {same}: give the data as it was{own_name}, or move {path} away to have it trained anew"
    )


def check_same_rows(run: Path, source: Source) -> None:
    """Raise UsageError if a run would go on with other prompts than it began with."""
    record = read_record(run)
    now = fingerprint(row_hashes(source.rows, source.columns))
    before = {name: record.get("trained_on", now)[name] for name in now}
    if now != before:
        raise UsageError(
            f"{run} began with {before['rows']:,} prompts of other rows than the {now['rows']:,} that there are now; "
            "give the data as it was"
        )


def described(path: str, record: dict) -> str:
    """In a line, what a stage is that is used again."""
    settings = Path(path) / "run_config.json"
    seed = f" with --seed {read_object(settings).get('seed')}" if settings.exists() else ""
    figures = {name: value for name, value in record["held_out"].items() if name not in ("rows", "sha256")}
    told = "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
    told += " on held-out rows" if told else ""
    return f"{path} is there and used as it is: trained{seed} on {record['trained_on']['rows']:,} rows at most{told}"


def overlaps(folders: Iterable[str], held_out: dict[str, Sequence[dict]]) -> list[str]:
    """A sentence for each model that was trained on some of the rows held out for a purpose, as its folder says."""
    notes = []
    for folder in dict.fromkeys(folders):
        place = run_above(Path(folder))
        record = read_record(place)
        if not record:
            continue
        trained_on = read_hashes(place)
        for part, rows in held_out.items():
            count = np.isin(row_hashes(rows, record["trained_on"]["columns"]), trained_on).sum()
            if count:
                notes.append(f"note: {folder} was trained on {count:,} of the {len(rows):,} rows for {part}")
    return notes


def overlaps_of_named(config: Config) -> list[str]:
    """The `overlaps` of the models that a training run was given by name with the rows that it holds out."""
    given = [config.base_model_name]
    if config.task == "train":
        given += [config.peft_model_path, config.reward_model_path]
    known = [path for path in given if path and read_record(run_above(Path(path)))]
    if not known or not config.dataset_path:  # reviews made here are alike by chance
        return []
    limits = {"validation": config.eval_samples, "test": config.eval_samples}
    if config.trains_from_scratch:
        limits["judge"] = most_texts(config, "sft")
    return overlaps(known, {part: load_rows(config, part, limit) for part, limit in limits.items()})
