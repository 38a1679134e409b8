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


@torch.no_grad()
def text_logits(
    classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], batch_size: int = 64
) -> TensorType["batch", "labels", is_float]:
    """The classifier's logits on the CPU. A text beyond its length loses its beginning: the response is at the end."""
    texts = [text or " " for text in texts]  # of no token at all, a batch could not be read
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # rows of like length share a batch
    logits = torch.empty(len(texts), classifier.config.num_labels)
    for start in range(0, len(texts), batch_size):
        rows = by_length[start : start + batch_size]
        encoded = tokenizer([texts[i] for i in rows], padding=True, truncation=True, return_tensors="pt")
        outputs = classifier(
            input_ids=encoded["input_ids"].to(classifier.device),
            attention_mask=encoded["attention_mask"].to(classifier.device),
        )
        logits[rows] = outputs.logits.float().cpu()
    return logits


def label_index(id2label: dict[int, str], label: str) -> int:
    """A label's index by name (any case) or number, "" for the last of one or two. Raises UsageError that names all."""
    if label == "" and len(id2label) <= 2:
        return max(id2label)
    indices = {str(index): index for index in id2label}
    for index, name in id2label.items():
        indices[name.lower()] = index  # also where a name is a number: `2` is then the label of that name
    if label.lower() in indices:
        return indices[label.lower()]
    known = ", ".join(f"{index} ({name})" for index, name in id2label.items())
    near = nearest(label.lower(), indices)
    raise UsageError(f"--reward_label must name one of the reward model's labels, not {label!r}: {known}{near}")


def reward_from_logits(logits: TensorType["batch", "labels", is_float], label: int, output: str) -> TensorType["batch"]:
    """z_l (`logit`), log p_l, p_l, or `margin` = log p_l - log(1 - p_l) = z_l - logsumexp of the other labels.

    A head with a single label (a regression) has nothing to compare with: it gives its logit whatever `output` says.
    """
    if output == "logit" or logits.shape[1] == 1:
        return logits[:, label]
    if output == "margin":
        is_other = torch.arange(logits.shape[1]) != label
        return logits[:, label] - logits[:, is_other].logsumexp(-1)
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
    classifier, found = load(
        AutoModelForSequenceClassification.from_pretrained,
        "reward_model_path",
        path,
        config=model_config,
        dtype=torch.float32,
        output_loading_info=True,
        **quantized(device, config.reward_in_8bit),
    )
    if found["missing_keys"]:
        missing = min(found["missing_keys"])
        raise UsageError(f"--reward_model_path {path} is no classifier: it has no {missing}")
    if not config.reward_in_8bit:
        classifier = classifier.to(device)
    classifier.requires_grad_(False)

    def reward_model(texts: list[str]) -> TensorType["batch"]:
        logits = text_logits(classifier, tokenizer, texts)
        return reward_from_logits(logits, label, config.reward_output)

    return reward_model


def classifier_term(config: Config, path: str, device: torch.device, separator: str) -> RewardTerm:
    """The classifier on the response, or on prompt and response joined as text and tokenised by its own tokenizer."""
    score = load_reward_model(config, path, device)

    def of_response(prompts: list[str], responses: list[str], rows: list[dict]) -> TensorType["batch"]:
        return score(responses)

    def of_both(prompts: list[str], responses: list[str], rows: list[dict]) -> TensorType["batch"]:
        texts = [prompt + separator + response for prompt, response in zip(prompts, responses, strict=True)]
        return score(texts)

    return of_response if config.reward_input == "response" else of_both


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
        classifier = load(AutoConfig.from_pretrained, "reward_model_path", config.reward_model_path)
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
