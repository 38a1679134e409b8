"""Rewards: named terms, each a function of prompts, responses and rows, and their weighted sum.

A term is a sequence classifier (`reward_model`), a user's own function (`reward_fn`), the share of words that repeat
(`repetition`) or a penalty for a length out of range (`length`). What the score is worth beside the KL is for ppo.py.
"""

import copy
import importlib.util
import inspect
import math
import os
import re
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torchtyping import TensorType, is_float
from transformers import AutoConfig

from adapters import base_of
from config import Config, RunError, UsageError, first_line, nearest
from files import file_and_name
from hub import load
from reward_model import check_is_no_language_model, check_says_labels, classifier_term, label_index

RewardTerm = Callable[[list[str], list[str], list[dict]], TensorType["batch"]]
TERMS = ("reward_model", "reward_fn", "repetition", "length")  # the names that --reward_weights may hold


def finite(text: str) -> float:
    """The number, but for infinities and NaN: then ValueError, as for what is no number."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(number)
    return number


def term_weights(config: Config) -> dict[str, float]:
    """--reward_weights, or 1 for the function, else the classifier. Raises UsageError if it is not name=number,..."""
    weights = {}
    try:
        for part in config.reward_weights.split(","):
            if part:
                name, number = part.split("=")
                if name.strip() in weights:
                    raise UsageError(f"--reward_weights {config.reward_weights!r} gives {name.strip()} two weights")
                weights[name.strip()] = finite(number)
    except ValueError:
        raise UsageError(f"--reward_weights is {config.reward_weights!r}, expected name=number,...") from None
    if not weights:
        return {"reward_fn": 1.0} if config.reward_fn else {"reward_model": 1.0}
    return weights


def needs_reward_model(config: Config) -> bool:
    return "reward_model" in term_weights(config)


def repetition(prompts: list[str], responses: list[str], rows: list[dict]) -> TensorType["batch", is_float]:
    """1 - unique / all words of each response, in [0, 1); words are lower-cased and split at white space.

    0 for an empty response as for a single word: nothing is said twice. That more is said is for `length` to ask.
    """
    shares = []
    for response in responses:
        words = response.lower().split()
        n_unique = len(set(words))
        shares.append(1 - n_unique / len(words) if words else 0.0)
    return torch.tensor(shares)


def length_term(text: str) -> RewardTerm:
    """0 for a response of LOW to HIGH words, both included, else -1. Raises UsageError if `text` is no `LOW,HIGH`."""
    found = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if found is None or int(found[1]) > int(found[2]):
        raise UsageError(f"--length_range is {text!r}, expected LOW,HIGH in words, 0 <= LOW <= HIGH")
    low = int(found[1])
    high = int(found[2])

    def length(prompts: list[str], responses: list[str], rows: list[dict]) -> TensorType["batch"]:
        counts = [len(response.split()) for response in responses]
        return torch.tensor([0.0 if low <= count <= high else -1.0 for count in counts])

    return length


# --------------------------------------------------------------------------------------------------------------------
# A function of the user's own
# --------------------------------------------------------------------------------------------------------------------

SHARED = (  # what one's code may change for all: how it is read, and how it is set again
    (lambda: sys.stdout, lambda stream: setattr(sys, "stdout", stream)),
    (lambda: sys.stderr, lambda stream: setattr(sys, "stderr", stream)),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, lambda _: torch.set_default_device(None)),  # which nothing here sets
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.is_grad_enabled, torch.set_grad_enabled),
)


@contextmanager
def on_its_own(spec: str, problem: str, kind: type[Exception]) -> Iterator[None]:
    """Run a user's code so that what it changes for all is put back, and that anything it raises but an interruption is
    told in a sentence of the given kind, with the line of the user's file.

    Random numbers are not put back: none of ours come from the global generators, and its own are to go on.
    """
    folder = os.getcwd()
    before = [read() for read, _ in SHARED]
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too, is no reason to leave without a word
        path = spec.rpartition(":")[0]
        place = line_of(error, os.path.abspath(path))
        where = f" ({path}, line {place})" if place else ""
        raise kind(f"{problem} {type(error).__name__}: {first_line(error)}{where}") from error
    finally:
        os.chdir(folder)  # without a look at where it is now, which may be nowhere
        for (read, write), value in zip(SHARED, before, strict=True):
            if read() != value:
                write(value)


def line_of(error: BaseException, path: str) -> int | None:
    """The innermost line of a file at which an error arose; None where it arose elsewhere."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == path]
    return lines[-1] if lines else None


def as_score(value) -> float:
    """A finite number of float32, be it a scalar of numpy or torch. Raises one of several errors for anything else."""
    if isinstance(value, (str, bytes, bytearray)) or getattr(value, "shape", ()) != ():
        raise TypeError(value)  # which float() would take, if it can be read as a number or is a row of one
    return finite(torch.tensor(float(value), dtype=torch.float32).item())


def checked_scores(function, spec: str, prompts: list[str], responses: list[str], rows: list[dict]) -> torch.Tensor:
    """What the user's function gives: finite numbers, one a response. Raises RunError saying what it did instead.

    It gets copies, and may do with them what it likes.
    """

    def asked(first: int, last: int):
        return function(prompts[first:last], responses[first:last], copy.deepcopy(rows[first:last]))

    def shown(row: int) -> str:
        return f"the prompt {reprlib.repr(prompts[row])} and the response {reprlib.repr(responses[row])}"

    try:
        with on_its_own(spec, f"--reward_fn {spec} raised", RunError):
            values = asked(0, len(responses))
    except RunError as error:
        row = first_to_fail(asked, spec, len(responses))
        where = shown(row) if row is not None else f"all of {len(responses)} responses, and none of them alone"
        raise RunError(f"{error}, for {where}") from error
    found = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(found, Sequence) or isinstance(found, (str, bytes, bytearray)):
        kind = type(values).__name__
        raise RunError(f"--reward_fn {spec} returned {kind}, expected a list of numbers, one a response")
    if len(found) != len(responses):
        raise RunError(
            f"--reward_fn {spec} returned {len(found)} scores, expected {len(responses)}, one a response; the first of "
            f"them is for {shown(0)}"
        )
    scores = []
    for row, value in enumerate(found):
        try:
            scores.append(as_score(value))
        except (TypeError, ValueError, OverflowError, RuntimeError):
            given = " ".join(reprlib.repr(value).split())
            raise RunError(
                f"--reward_fn {spec} returned {given} for response {row}, expected a finite number: {shown(row)}"
            ) from None
    return torch.tensor(scores, dtype=torch.float32)


def first_to_fail(asked: Callable, spec: str, n_responses: int) -> int | None:
    """A response for which the user's function raises when it is asked for that one alone, found by halving, as every
    call may cost something; None if there is none.
    """

    def fails(first: int, last: int) -> bool:
        try:
            with on_its_own(spec, "", RunError):
                asked(first, last)
        except RunError:
            return True
        return False

    first, last = 0, n_responses
    while last - first > 1:
        middle = (first + last) // 2
        if fails(first, middle):
            last = middle
        else:
            first = middle
    return first if fails(first, last) else None


def load_reward_function(spec: str) -> RewardTerm:
    """FILE.py:NAME as a term whose result is checked. Raises UsageError if there is no such file or function, or if it
    does not take what it is given.
    """
    path, name = file_and_name(spec)
    module_spec = importlib.util.spec_from_file_location("user_reward", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where dataclasses and pickle look a module up
    with on_its_own(spec, f"--reward_fn {path} cannot be run:", UsageError):
        module_spec.loader.exec_module(module)
    functions = {key: value for key, value in vars(module).items() if callable(value)}
    if name not in functions:
        raise UsageError(f"--reward_fn {path} has no function {name!r}{nearest(name, functions)}")
    check_parameters(functions[name], spec)
    return partial(checked_scores, functions[name], spec)


def check_parameters(function: Callable, spec: str) -> None:
    """Raise UsageError for a function that does not take prompts, responses and rows."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # one written in C may not say
        return
    try:
        signature.bind([], [], [])
    except TypeError:
        raise UsageError(f"--reward_fn {spec} takes {signature}, expected (prompts, responses, rows)") from None


# --------------------------------------------------------------------------------------------------------------------
# The sum
# --------------------------------------------------------------------------------------------------------------------


def check_weights(config: Config) -> None:
    """Raise UsageError if the terms are none of ours, or lack what they need: a range, the function, the label."""
    names = term_weights(config)
    for name in names:
        if name not in TERMS:
            known = ", ".join(TERMS)
            raise UsageError(f"--reward_weights names {name!r}; the terms are {known}{nearest(name, TERMS)}")
    if ("reward_fn" in names) != bool(config.reward_fn):
        missing = "a weight for reward_fn" if config.reward_fn else "--reward_fn FILE.py:NAME"
        raise UsageError(f"--reward_weights {config.reward_weights!r} needs {missing}: neither counts alone")
    if "length" in names or config.length_range:
        length_term(config.length_range)
    if config.task == "train" and config.reward_model_path and needs_reward_model(config):
        check_says_labels(config.reward_model_path)
        classifier = load(AutoConfig.from_pretrained, "reward_model_path", config.reward_model_path)
        if base_of(config.reward_model_path) == config.reward_model_path:  # beside an adapter it may be the base's name
            check_is_no_language_model(classifier, config.reward_model_path)
        label_index(classifier.id2label, config.reward_label)


def load_reward_terms(config: Config, path: str, device: torch.device, separator: str = "") -> dict[str, RewardTerm]:
    """The terms by name; the classifier at `path` reads prompt and response with the policy's `separator` between."""
    check_weights(config)
    terms = {}
    for name in term_weights(config):
        if name == "reward_model":
            terms[name] = classifier_term(config, path, device, separator)
        elif name == "reward_fn":
            terms[name] = load_reward_function(config.reward_fn)
        elif name == "repetition":
            terms[name] = repetition
        else:
            terms[name] = length_term(config.length_range)
    return terms


def total_reward(
    terms: dict[str, RewardTerm], prompts: list[str], responses: list[str], rows: list[dict], config: Config
) -> tuple[TensorType["batch"], dict[str, TensorType["batch"]]]:
    """Σ_i w_i term_i for each response, with weight 1 for a term that is given none; and the terms by name.

    The sum is one to be raised, so a term's weight has the sign of what is wanted: above 0 for `reward_model`,
    `reward_fn` and `length` (at most 0: a penalty already), below 0 for `repetition` (at least 0, and worse if higher).
    """
    weights = term_weights(config)
    values = {}
    total = torch.zeros(len(responses))
    for name, term in terms.items():
        values[name] = term(prompts, responses, rows)
        total = total + weights.get(name, 1.0) * values[name]
    return total, values
