"""Rewards: named terms, each a function of prompts, responses and rows, and their weighted sum.

A term is the sequence classifier of `--reward_model_path` (`reward_model`) or a user's own function (`reward_fn`).
This module only scores; what the score is worth beside the KL is decided in ppo.py.
"""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torchtyping import TensorType

from config import Config, RunError, UsageError, nearest
from loading import load_reward_model

RewardTerm = Callable[[list[str], list[str], list[dict]], TensorType["batch"]]


def needs_reward_model(config: Config) -> bool:
    """A reward function replaces the classifier, unless --reward_weights names both."""
    return not config.reward_fn or "reward_model" in parse_weights(config.reward_weights)


def load_reward_terms(config: Config, path: str, device: torch.device, separator: str = "") -> dict[str, RewardTerm]:
    """The terms by name, the classifier being the one at `path`.

    `separator` stands between prompt and response where a classifier reads both: nothing for a causal model, whose
    response goes on in mid-sentence, a line break for an encoder-decoder's.
    """
    check_weights(config)
    terms: dict[str, RewardTerm] = {}
    if config.reward_fn:
        terms["reward_fn"] = load_reward_function(config.reward_fn)
    if needs_reward_model(config):
        terms["reward_model"] = classifier_term(config, path, device, separator)
    return terms


def check_weights(config: Config) -> None:
    """Raise UsageError if --reward_weights names a term that this run does not have."""
    terms = ["reward_fn"] * bool(config.reward_fn) + ["reward_model"] * needs_reward_model(config)
    for name in parse_weights(config.reward_weights):
        if name not in terms:
            known = f"{', '.join(terms)}{nearest(name, terms)}"
            raise UsageError(f"--reward_weights names {name!r}; the terms here are {known}")


def parse_weights(text: str) -> dict[str, float]:
    """`name=number,...` as a dict. Raises UsageError if it is not that."""
    weights = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        try:
            weights[name.strip()] = float(number)
            if not math.isfinite(float(number)):
                raise ValueError(number)
        except ValueError:
            raise UsageError(f"--reward_weights has {part!r}, expected name=number, ...") from None
    return weights


def total_reward(
    terms: dict[str, RewardTerm], prompts: list[str], responses: list[str], rows: list[dict], config: Config
) -> tuple[TensorType["batch"], dict[str, TensorType["batch"]]]:
    """Σ_i w_i term_i for each response, with weight 1 for a term that is given none; and the terms by name."""
    weights = parse_weights(config.reward_weights)
    values = {name: term(prompts, responses, rows) for name, term in terms.items()}
    return sum(weights.get(name, 1.0) * value for name, value in values.items()), values


def classifier_term(config: Config, path: str, device: torch.device, separator: str) -> RewardTerm:
    """The classifier on the response, or on prompt and response joined as text and tokenised by its own tokenizer."""
    reward_model = load_reward_model(config, path, device)

    def score(prompts: list[str], responses: list[str], rows: list[dict]) -> TensorType["batch"]:
        if config.reward_input == "response":
            return reward_model(responses)
        return reward_model([separator.join(pair) for pair in zip(prompts, responses, strict=True)])

    return score


def load_reward_function(spec: str) -> RewardTerm:
    """FILE.py:NAME as a term whose result is checked. Raises UsageError if there is no such file or function."""
    path, _, name = spec.rpartition(":")
    if not path or not Path(path).is_file():
        raise UsageError(f"--reward_fn {spec}: expected FILE.py:NAME with an existing file")
    module_spec = importlib.util.spec_from_file_location("user_reward", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"--reward_fn {path} cannot be imported: {type(error).__name__}: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"--reward_fn {path} has no function {name!r}{nearest(name, functions)}")

    def score(prompts: list[str], responses: list[str], rows: list[dict]) -> TensorType["batch"]:
        try:
            values = function(prompts, responses, rows)
        except Exception as error:
            raise RunError(f"--reward_fn {spec} raised {type(error).__name__}: {error}") from error
        return check_scores(values, len(responses), spec)

    return score


def check_scores(values, expected: int, spec: str) -> TensorType["batch"]:
    """A list, array or tensor of `expected` finite numbers as a tensor. Raises RunError saying what it was."""
    try:
        scores = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise RunError(f"--reward_fn {spec} returned {type(values).__name__}, expected a list of numbers") from None
    if scores.shape != (expected,):
        raise RunError(f"--reward_fn {spec} returned {list(scores.shape)} scores, expected {expected}, one a response")
    for row, score in enumerate(scores.tolist()):
        if not math.isfinite(score):
            raise RunError(f"--reward_fn {spec} returned {score} for response {row}, expected a finite number")
    return scores
