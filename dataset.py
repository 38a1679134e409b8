"""Rows of data from the Hub, a folder, a file, or the built-in generated reviews; and ids padded into batches.

Every source is divided into four parts that share no row: `train` (the models, the reward model and the prompts of
PPO), `judge` (the independent judges of an evaluation), `validation` (to choose by) and `test` (to report on).
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import yaml
from huggingface_hub import DatasetCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from torch.nn.functional import pad as widen
from torch.nn.utils.rnn import pad_sequence
from torchtyping import TensorType
from transformers import PreTrainedTokenizerBase

from config import Config, UsageError, first_line, nearest
from files import format_of, read_object
from hub import hub_error
from reviews import movie_reviews
from rows import IN_A_BATCH, Row, Rows, check_is_utf_8, open_table
from trust import check_links, check_names

PARTS = ("train", "judge", "validation", "test")
OWN_SPLITS = {  # a dataset's names for parts, of which the last that it has counts
    "dev": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
SHARES = {"judge": 25, "validation": 10, "test": 10}  # per cent of the training split, where there is none of its own
# half of a character as JSON escapes it, first or second
HALF = rb"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]"
CHECKED = "text_is_checked"  # a file beside what `datasets` has made of a file's rows, which stays until it changes
LOOKED_AT = 20_000  # rows that are looked at one by one before the work begins; of more, the others when they are used
UNREADABLE = re.compile(rb"(^|[\[,])\s*null\s*($|[\],])|" + HALF)  # in JSON, what the library may fall over or drop


def load_splits(path: str, name: str = "") -> dict:
    """The dataset's splits by name, through `datasets`; `name` is its configuration's, where it has several.

    Raises UsageError, whatever went wrong there.
    """
    place, kind = Path(path), format_of(path)
    unreachable = "" if place.exists() else hub_error()
    import datasets  # a second to import, which --help and the built-in data need not wait for

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.ArrowBasedBuilder.DEFAULT_WRITER_BATCH_SIZE = IN_A_BATCH
    try:
        if kind:
            options = {"encoding": "utf-8-sig"} if kind == "text" else {}  # the others drop a mark by themselves
            builder = datasets.load_dataset_builder(kind, data_files=path, **options)
            splits = prepared(builder, path, kind)
            check_is_rows(splits["train"].take(2).to_list(), path)  # by a number, an image it names would be opened
            return splits
        check_places(path)
        if is_saved(place):
            saved = datasets.load_from_disk(path)
            return saved if isinstance(saved, dict) else {"train": saved}
        return prepared(datasets.load_dataset_builder(path, name or None), path)
    except UsageError:
        raise
    except Exception as error:  # the library raises a dozen kinds
        text = str(error.__cause__ or error).removeprefix("An error occurred while generating the dataset").strip()
        if kind == "json":
            check_json(path)
        if "corresponds to no data" in text:
            raise UsageError(f"--dataset_path {path} holds no rows") from None
        known = re.search(r"available configs: (\[.*?\])|Available: (\[.*?\])", text, re.DOTALL)
        if known:
            raise UsageError(
                f"--dataset_config {name!r} is none of the configurations of {path}: {known[1] or known[2]}"
            ) from None
        raise UsageError(
            f"--dataset_path {path} cannot be loaded: {unreachable or first_line(Exception(text))}"
        ) from None


def prepared(builder, path: str, kind: str | None = None) -> dict:
    """The splits that a builder of `datasets` makes, or has made at an earlier start. Their text is checked once."""
    checked = Path(builder.cache_dir) / CHECKED
    if kind and not checked.exists():
        check_is_text(path, kind)
    builder.download_and_prepare()
    splits = builder.as_dataset()
    if not checked.exists():
        for split in splits.values():
            check_is_utf_8(open_table(split, path))
        with suppress(OSError):  # others' folder: it is checked again the next time
            checked.touch()
    return splits


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` has written it."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def named_files(value) -> list:
    """The files, patterns and folders in a part of a dataset's card that names them: a text, or several by split."""
    if isinstance(value, dict):
        return named_files([each for key, each in value.items() if key != "split"])
    if isinstance(value, list):
        return [name for each in value for name in named_files(each)]
    return [] if value is None else [value]


def card_of(path: str, name: str) -> dict:
    """The settings in a file that says how a dataset, in a folder or on the Hub, is to be loaded."""
    file = Path(path) / name
    if not Path(path).is_dir():
        with suppress(EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
            file = Path(hf_hub_download(path, name, repo_type="dataset"))
    if not file.is_file():
        return {}
    if name.endswith(".md"):
        return DatasetCard.load(file).data.to_dict()
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def check_places(path: str) -> None:
    """Raise UsageError where a dataset, in a folder or on the Hub, names files that are not its own, or links to them:
    they would be read, and with a protocol be fetched from anywhere.
    """
    folder = Path(path)
    if folder.is_dir():
        check_links(folder, "dataset_path")
    names = {}
    for file in ("README.md", ".huggingface.yaml"):
        for own in card_of(path, file).get("configs") or []:
            names[file] = names.get(file, []) + named_files([own.get("data_files"), own.get("data_dir")])
    for file in folder.glob("dataset_dict.json"):
        names[file.name] = read_object(file).get("splits", [])
    for file in folder.rglob("state.json") if is_saved(folder) else ():
        names[file.relative_to(folder)] = [each["filename"] for each in read_object(file).get("_data_files", [])]
    for file, found in names.items():
        check_names(found, f"--dataset_path {path}: its {file}")


def check_is_text(path: str, kind: str) -> None:
    """Raise UsageError for an empty file, for one of text that is not in UTF-8, naming the line, and for JSON that the
    library would fall over: a null in place of a row ends the process, half a character is dropped without a word.
    """
    if Path(path).stat().st_size == 0:
        raise UsageError(f"--dataset_path {path} is empty, expected rows")
    if kind == "parquet":
        return
    is_suspect = False
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            is_suspect = is_suspect or (kind == "json" and UNREADABLE.search(line) is not None)
            try:
                line.decode()
            except UnicodeDecodeError as error:
                found = f"line {number} has the byte {line[error.start]:#x}"
                raise UsageError(f"--dataset_path {path} is not text in UTF-8: {found}; save it as UTF-8") from None
    if is_suspect:
        check_json(path)


def check_json(path: str) -> None:
    """Raise UsageError for the first row of a JSON file that cannot be read, naming row and column."""
    for number, row in enumerate(json_rows(path), 1):
        if not isinstance(row, dict):
            raise UsageError(f"--dataset_path {path}: row {number} is {json.dumps(row)[:80]}, expected an object")
        for name, value in row.items():
            if isinstance(value, int) and not -(2**63) <= value < 2**64:
                raise UsageError(f"--dataset_path {path}: column {name!r} holds more than 64 bits in row {number}")
            try:
                json.dumps([name, value], ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = f"half a character (\\u{ord(error.object[error.start]):x} alone)"
                raise UsageError(f"--dataset_path {path}: column {name!r} holds {half} in row {number}") from None


def json_rows(path: str) -> Iterator:
    """The rows of a JSON file: those of a list, be they texts, an object over several lines, or one a line.

    Raises UsageError naming the line that is no JSON.
    """
    with open(path, encoding="utf-8-sig") as file:
        first = file.readline()
        begins = first if first.strip() else next((line for line in file if line.strip()), "")
        is_list = begins.lstrip().startswith("[")
        is_one = is_list or first.strip() == "{"
        file.seek(0)
        for number, part in enumerate([file.read()] if is_one else file, 1):
            if not part.strip():
                continue
            try:
                found = json.loads(part.removesuffix("\n"), object_pairs_hook=columns_once)
            except (ValueError, RecursionError) as error:
                line = number + getattr(error, "lineno", 1) - 1
                reason = getattr(error, "msg", str(error))
                raise UsageError(f"--dataset_path {path} cannot be loaded: line {line} is no JSON: {reason}") from None
            rows = found if is_list else [found]
            is_texts = is_list and all(isinstance(row, str) for row in rows)
            yield from ({"text": row} for row in rows) if is_texts else rows


def columns_once(pairs: list[tuple]) -> dict:
    """The object of these names and values. Raises ValueError if a name comes twice."""
    columns = dict(pairs)
    if len(columns) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in columns if names.count(name) > 1)
        raise ValueError(f"the column {twice!r} comes twice")
    return columns


def check_is_rows(rows: list[dict], path: str) -> None:
    """Raise UsageError for a file, of which the first rows are given, that holds one object with the rows inside."""
    if len(rows) != 1:
        return
    for name, value in rows[0].items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and "role" not in value[0]:
            raise UsageError(
                f"--dataset_path {path} is one object with its rows in {name!r}; "
                "expected a list of rows, or an object a line"
            )


def own_splits(splits: dict, training_split: str) -> dict[str, str]:
    """The parts for which the dataset has a split, with its name: never the one that is trained on."""
    own = {}
    for name, part in OWN_SPLITS.items():
        if name in splits and name != training_split:
            own[part] = name
    return own


def held_out_shares(own: dict[str, str], with_judge: bool) -> dict[str, int]:
    """What the training split gives to the parts that have no split of their own, in per cent."""
    shares = {part: percent for part, percent in SHARES.items() if part not in own}
    if not with_judge:
        del shares["judge"]
    return shares


def shuffled_rows(split, path: str) -> Rows | list:
    """Always in the same order, but not in the file's: some are sorted by label."""
    if len(split) == 0:
        return []
    order = np.arange(len(split), dtype=np.uint32)
    np.random.default_rng(0).shuffle(order)
    return Rows(open_table(split, path), order)


def divide(rows: Sequence[dict], shares: dict[str, int]) -> dict[str, Sequence[dict]]:
    """So many per cent of the rows for each part, one row at least, and the rest for `train`."""
    parts = {"judge": []}  # where no share is for it
    start = 0
    for part, percent in shares.items():
        end = start + max(1, len(rows) * percent // 100)
        parts[part] = rows[start:end]
        start = end
    parts["train"] = rows[start:]
    return parts


@functools.cache
def split_parts(path: str, name: str, split: str, with_judge: bool) -> dict[str, Sequence[dict]]:
    """The rows of every part: a split of its own, else a fixed random share of the training split, as is then said.

    A tenth each for validation and test; a quarter for the judges, which only the models trained here have.
    """
    splits = load_splits(path, name)
    if split not in splits:
        known = ", ".join(splits) + nearest(split, splits)
        raise UsageError(f"--dataset_split {split!r} is not in {path}; it has {known}")
    own = own_splits(splits, split)
    shares = held_out_shares(own, with_judge)
    rows = shuffled_rows(splits[split], path)
    parts = divide(rows, shares)
    for part, name in own.items():
        parts[part] = shuffled_rows(splits[name], path)
    for part in ("train", "validation", "test"):
        if not parts[part]:
            raise UsageError(f"--dataset_path {path} has no rows for {part}: {len(rows)} in {split!r}")
    if shares:
        told = ", ".join(f"{len(parts[part])} rows for {part}" for part in shares)
        print(f"held out of {path} ({split}): {told}; {len(parts['train'])} are left to train on")
    return parts


built_in_rows = functools.cache(movie_reviews)  # a run's stages read the same corpus


def load_rows(config: Config, part: str, limit: int | None = None) -> Sequence[dict]:
    """The rows of one part, or the first `limit`. Raises UsageError if the data is missing, empty or unreadable."""
    if not config.dataset_path:
        return built_in_rows(min(limit or config.n_reviews, config.n_reviews), PARTS.index(part))
    path, name, split = config.dataset_path, config.dataset_config, config.dataset_split
    return split_parts(path, name, split, with_judge=config.trains_from_scratch)[part][:limit]


def most_texts(config: Config, stage: str) -> int | None:
    """How many rows a stage, `sft` or `reward`, takes from the data, where there are more; None: all of them.

    They are those that its steps have room for, and no fewer than are looked at beforehand.
    """
    if stage == "sft":
        steps, batch_size = config.sft_steps, config.sft_batch_size
    else:
        steps, batch_size = config.reward_steps, config.reward_batch_size
    takes_all = stage == "sft" and config.sft_epochs
    return None if takes_all else max(LOOKED_AT, steps * batch_size)


def place_of(row: dict) -> str:
    """`row 7` of its file, where it is of one."""
    return f"row {row.number}" if isinstance(row, Row) else "a row"


def in_file_order(rows: Sequence[dict]) -> Sequence[dict]:
    """The rows as they were before they were shuffled, so that of several that are wrong the first is named."""
    if isinstance(rows, Rows):
        return rows.in_file_order()
    return sorted(rows, key=lambda row: getattr(row, "number", 0))


def suspects(rows: Sequence[dict], name: str, kind: type | tuple[type, ...] = str) -> Sequence[dict]:
    """The rows that may hold something else than `kind` in a column: all of those that have no type in common."""
    return rows.suspects(name, kind) if isinstance(rows, Rows) else rows


def in_words(kind: type) -> str:
    """What a value of a column is called."""
    names = {str: "text", int: "whole number", float: "fraction", list: "list", dict: "group of columns"}
    names |= {type(None): "null", object: "value"}
    return names.get(kind, f"value of type {kind.__name__}")


def check_column(rows: Sequence[dict], name: str, flag: str, kind: type | tuple[type, ...] = str) -> None:
    """Raise UsageError unless there is the column, naming those that there are, and it holds `kind` in every row.

    Any `kind` there is does not take a null.
    """
    first_row = rows[0]
    if name not in first_row:
        known = ", ".join(first_row) + nearest(name, first_row)
        raise UsageError(f"--{flag} {name!r} is no column of the data; it has {known}")
    for row in in_file_order(suspects(rows, name, kind)):
        if row[name] is None or not isinstance(row[name], kind):
            expected = " or ".join(map(in_words, kind if isinstance(kind, tuple) else (kind,)))
            raise UsageError(
                f"--{flag} {name!r} holds a {in_words(type(row[name]))} in {place_of(row)}, expected a {expected}"
            )


def column(rows: Sequence[dict], name: str, flag: str, kind: type | tuple[type, ...] = str) -> list:
    """One column of the rows. Raises UsageError as `check_column` does."""
    check_column(rows, name, flag, kind)
    return [row[name] for row in (rows.only([name]) if isinstance(rows, Rows) else rows)]


def distinct(rows: Sequence[dict], name: str) -> set:
    """The values of a column of numbers or texts, each once."""
    return rows.distinct(name) if isinstance(rows, Rows) else {row[name] for row in rows}


def pad(
    sequences: list[list[int]], pad_id: int, side: str
) -> tuple[TensorType["batch", "sequence"], TensorType["batch", "sequence", bool]]:
    """Ids and mask as wide as the longest sequence; the padding is on the `left` (causal prompts) or the `right`."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row).bool() for row in rows], batch_first=True, padding_side=side)
    return ids, mask


def join_rows(parts: list[torch.Tensor], fill: int = 0, side: str = "right") -> torch.Tensor:
    """All parts' rows, (rows,) or (rows, columns): as wide as the widest part, with `fill` on the `left` or `right`."""
    if parts[0].dim() == 1:
        return torch.cat(parts)
    missing = [max(other.shape[1] for other in parts) - part.shape[1] for part in parts]
    margins = [(n, 0) if side == "left" else (0, n) for n in missing]
    return torch.cat([widen(part, margin, value=fill) for part, margin in zip(parts, margins, strict=True)])


def decode_responses(
    tokenizer: PreTrainedTokenizerBase,
    query_ids: TensorType["batch", "query"],
    query_mask: TensorType["batch", "query", bool],
    response_ids: TensorType["batch", "time"],
    mask: TensorType["batch", "time", bool],
    is_encoder_decoder: bool,
) -> list[str]:
    """The responses as text, without special tokens.

    A causal model's response is decoded behind its prompt: some tokenizers drop the space in front of a first word.
    """
    texts = []
    for query, is_real, response, is_response in zip(query_ids, query_mask, response_ids, mask, strict=True):
        before = query[:0] if is_encoder_decoder else query[is_real]
        both = torch.cat([before, response[is_response]])
        start = len(tokenizer.decode(before, skip_special_tokens=True))
        texts.append(tokenizer.decode(both, skip_special_tokens=True)[start:])
    return texts
