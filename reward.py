"""Rewards: named terms, each a function of prompts, responses and rows, and their weighted sum.

A term is a sequence classifier (`reward_model`), a user's own function (`reward_fn`), the share of words that repeat
(`repetition`) or a penalty for a length out of range (`length`). What the score is worth beside the KL is for ppo.py.
"""

import importlib.util
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torchtyping import TensorType, is_float
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from config import Config, RunError, UsageError, first_line, nearest
from loading import context_length, load, load_tokenizer, prepare_config, quantized

RewardTerm = Callable[[list[str], list[str], list[dict]], TensorType["batch"]]
TERMS = ("reward_model", "reward_fn", "repetition", "length")  # the names that --reward_weights may hold


def term_weights(config: Config) -> dict[str, float]:
    """--reward_weights, or 1 for the function, else the classifier. Raises UsageError if it is not name=number,..."""
    try:
        parts = [part.split("=") for part in config.reward_weights.split(",") if part]
        weights = {name.strip(): float(number) for name, number in parts}
        if not all(map(math.isfinite, weights.values())):
            raise ValueError(weights)
    except ValueError:
        raise UsageError(f"--reward_weights is {config.reward_weights!r}, expected name=number,...") from None
    return weights or {"reward_fn" if config.reward_fn else "reward_model": 1.0}


def needs_reward_model(config: Config) -> bool:
    return "reward_model" in term_weights(config)


def load_reward_terms(config: Config, path: str, device: torch.device, separator: str = "") -> dict[str, RewardTerm]:
    """The terms by name; the classifier at `path` reads prompt and response with the policy's `separator` between."""
    check_weights(config)
    makers = {
        "reward_model": lambda: classifier_term(config, path, device, separator),
        "reward_fn": lambda: load_reward_function(config.reward_fn),
        "repetition": lambda: repetition,
        "length": lambda: length_term(config.length_range),
    }
    return {name: makers[name]() for name in term_weights(config)}


def check_weights(config: Config) -> None:
    """Raise UsageError if the terms are none of ours, or lack what they need: a range, the function, the label."""
    names = term_weights(config)
    for name in names:
        if name not in TERMS:
            raise UsageError(f"--reward_weights names {name!r}; the terms are {', '.join(TERMS)}{nearest(name, TERMS)}")
    if ("reward_fn" in names) != bool(config.reward_fn):
        missing = "a weight for reward_fn" if config.reward_fn else "--reward_fn FILE.py:NAME"
        raise UsageError(f"--reward_weights {config.reward_weights!r} needs {missing}: neither counts alone")
    if "length" in names or config.length_range:
        length_term(config.length_range)
    if config.task == "train" and config.reward_model_path and needs_reward_model(config):
        classifier = load(AutoConfig.from_pretrained, "reward_model_path", config.reward_model_path)
        label_index(classifier.id2label, config.reward_label)


def total_reward(
    terms: dict[str, RewardTerm], prompts: list[str], responses: list[str], rows: list[dict], config: Config
) -> tuple[TensorType["batch"], dict[str, TensorType["batch"]]]:
    """Σ_i w_i term_i for each response, with weight 1 for a term that is given none; and the terms by name.

    The sum is one to be raised, so a term's weight has the sign of what is wanted: above 0 for `reward_model`,
    `reward_fn` and `length` (at most 0: a penalty already), below 0 for `repetition` (at least 0, and worse if higher).
    """
    weights = term_weights(config)
    values = {name: term(prompts, responses, rows) for name, term in terms.items()}
    return sum(weights.get(name, 1.0) * value for name, value in values.items()), values


def repetition(prompts: list[str], responses: list[str], rows: list[dict]) -> TensorType["batch", is_float]:
    """1 - unique / all words of each response, in [0, 1); words are lower-cased and split at white space.

    0 for an empty response as for a single word: nothing is said twice. That more is said is for `length` to ask.
    """
    words = [response.lower().split() for response in responses]
    return torch.tensor([1 - len(set(row)) / len(row) if row else 0.0 for row in words])


def length_term(text: str) -> RewardTerm:
    """0 for a response of LOW to HIGH words, both included, else -1. Raises UsageError if `text` is no `LOW,HIGH`."""
    found = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    low, high = map(int, found.groups()) if found else (1, 0)
    if low > high:
        raise UsageError(f"--length_range is {text!r}, expected LOW,HIGH in words, 0 <= LOW <= HIGH")
    return lambda prompts, responses, rows: torch.tensor([(low <= len(r.split()) <= high) - 1.0 for r in responses])


def classifier_term(config: Config, path: str, device: torch.device, separator: str) -> RewardTerm:
    """The classifier on the response, or on prompt and response joined as text and tokenised by its own tokenizer."""
    score = load_reward_model(config, path, device)
    if config.reward_input == "response":
        return lambda prompts, responses, rows: score(responses)
    return lambda prompts, responses, rows: score([p + separator + r for p, r in zip(prompts, responses, strict=True)])


def load_reward_function(spec: str) -> RewardTerm:
    """FILE.py:NAME as a term whose result is checked. Raises UsageError if there is no such file or function."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file() or Path(path).suffix != ".py":
        raise UsageError(f"--reward_fn {spec}: expected FILE.py:NAME with an existing file")
    module_spec = importlib.util.spec_from_file_location("user_reward", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where dataclasses and pickle look a module up
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"--reward_fn {path} cannot be run: {type(error).__name__}: {first_line(error)}") from None
    functions = {key: value for key, value in vars(module).items() if callable(value)}
    if name not in functions:
        raise UsageError(f"--reward_fn {path} has no function {name!r}{nearest(name, functions)}")
    return partial(checked_scores, functions[name], spec)


def checked_scores(function, spec: str, prompts: list[str], responses: list[str], rows: list[dict]) -> torch.Tensor:
    """What the user's function gives: finite numbers, one a response. Raises RunError saying what it did instead."""
    try:
        values = function(prompts, responses, rows)
    except (Exception, SystemExit) as error:
        raise RunError(f"--reward_fn {spec} raised {type(error).__name__}: {first_line(error)}") from error
    try:
        scores = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise RunError(f"--reward_fn {spec} returned {type(values).__name__}, expected a list of numbers") from None
    if scores.shape != (len(responses),):
        shape = list(scores.shape)
        raise RunError(f"--reward_fn {spec} returned {shape} scores, expected {len(responses)}, one a response")
    for row, score in enumerate(scores.tolist()):
        if not math.isfinite(score):
            raise RunError(f"--reward_fn {spec} returned {score} for response {row}, expected a finite number")
    return scores


@torch.no_grad()
def text_logits(
    classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], batch_size: int = 64
) -> TensorType["batch", "labels", is_float]:
    """The classifier's logits on the CPU. A text beyond its length loses its beginning: the response is at the end."""
    texts = [text or " " for text in texts]  # of no token at all, a batch could not be read
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # rows of like length share a batch
    logits = torch.empty(len(texts), classifier.config.num_labels)
    for start in range(0, len(texts), batch_size):
        rows = order[start : start + batch_size]
        encoded = tokenizer([texts[i] for i in rows], padding=True, truncation=True, return_tensors="pt")
        encoded = {name: encoded[name].to(classifier.device) for name in ("input_ids", "attention_mask")}
        logits[rows] = classifier(**encoded).logits.float().cpu()
    return logits


def label_index(id2label: dict[int, str], label: str) -> int:
    """A label's index by name (any case) or number, "" for the last of one or two. Raises UsageError that names all."""
    indices = {str(index): index for index in id2label} | {name.lower(): index for index, name in id2label.items()}
    if label == "" and len(id2label) <= 2:
        return max(id2label)
    if label.lower() in indices:
        return indices[label.lower()]
    known = ", ".join(f"{index} ({name})" for index, name in id2label.items()) + nearest(label.lower(), indices)
    raise UsageError(f"--reward_label must name one of the reward model's labels, not {label!r}: {known}")


def reward_from_logits(logits: TensorType["batch", "labels", is_float], label: int, output: str) -> TensorType["batch"]:
    """z_l (`logit`), log p_l, p_l, or `margin` = log p_l - log(1 - p_l) = z_l - logsumexp of the other labels.

    A head with a single label (a regression) has nothing to compare with: it gives its logit whatever `output` says.
    """
    if output == "logit" or logits.shape[1] == 1:
        return logits[:, label]
    if output == "margin":
        return logits[:, label] - logits[:, torch.arange(logits.shape[1]) != label].logsumexp(-1)
    logprobs = logits.log_softmax(-1)[:, label]
    return logprobs if output == "logprob" else logprobs.exp()


def load_reward_model(config: Config, path: str, device: torch.device) -> Callable[[list[str]], TensorType["batch"]]:
    """The classifier at `path`, from texts to rewards. Raises UsageError for a label or head that it does not have."""
    tokenizer = load_tokenizer(path, "reward_model_path")
    model_config = prepare_config(load(AutoConfig.from_pretrained, "reward_model_path", path))
    label = label_index(model_config.id2label, config.reward_label)
    if model_config.pad_token_id is None:
        model_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = min(tokenizer.model_max_length, context_length(model_config))
    settings = {"config": model_config, "dtype": torch.float32} | quantized(device, config.reward_in_8bit)
    factory = AutoModelForSequenceClassification.from_pretrained
    classifier, found = load(factory, "reward_model_path", path, **settings, output_loading_info=True)
    if found["missing_keys"]:
        raise UsageError(f"--reward_model_path {path} is no classifier: it has no {min(found['missing_keys'])}")
    classifier = (classifier if config.reward_in_8bit else classifier.to(device)).requires_grad_(False)
    return lambda texts: reward_from_logits(text_logits(classifier, tokenizer, texts), label, config.reward_output)
