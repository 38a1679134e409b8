"""Rewards: named terms, each a function of prompts, responses and rows, and their weighted sum.

A term is a sequence classifier (`reward_model`), a user's own function (`reward_fn`), the share of words that repeat
(`repetition`) or a penalty for a length out of range (`length`). What the score is worth beside the KL is for ppo.py.
"""

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torchtyping import TensorType, is_float
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from config import Config, RunError, UsageError, first_line, nearest
from loading import context_length, load, load_tokenizer, quantized, without_dropout

RewardTerm = Callable[[list[str], list[str], list[dict]], TensorType["batch"]]
TERMS = ("reward_model", "reward_fn", "repetition", "length")  # the names that --reward_weights may hold


def term_names(config: Config) -> list[str]:
    """The terms that --reward_weights names; without it the function if there is one, else the classifier."""
    return list(parse_weights(config.reward_weights)) or ["reward_fn" if config.reward_fn else "reward_model"]


def needs_reward_model(config: Config) -> bool:
    return "reward_model" in term_names(config)


def load_reward_terms(config: Config, path: str, device: torch.device, separator: str = "") -> dict[str, RewardTerm]:
    """The terms by name, the classifier being the one at `path`.

    `separator` stands between prompt and response where a classifier reads both: nothing for a causal model, whose
    response goes on in mid-sentence, a line break for an encoder-decoder's.
    """
    check_weights(config)
    makers = {
        "reward_model": lambda: classifier_term(config, path, device, separator),
        "reward_fn": lambda: load_reward_function(config.reward_fn),
        "repetition": lambda: repetition,
        "length": lambda: length_term(*parse_range(config.length_range)),
    }
    return {name: makers[name]() for name in term_names(config)}


def check_weights(config: Config) -> None:
    """Raise UsageError if the terms are none of ours, or lack what they need: a range, the function, the label."""
    names = parse_weights(config.reward_weights)
    for name in names:
        if name not in TERMS:
            raise UsageError(f"--reward_weights names {name!r}; the terms are {', '.join(TERMS)}{nearest(name, TERMS)}")
    if names and ("reward_fn" in names) != bool(config.reward_fn):
        missing = "a weight for reward_fn" if config.reward_fn else "--reward_fn FILE.py:NAME"
        raise UsageError(f"--reward_weights {config.reward_weights!r} needs {missing}: neither counts alone")
    if "length" in names or config.length_range:
        parse_range(config.length_range)
    if config.task == "train" and config.reward_model_path and needs_reward_model(config):
        classifier = load(AutoConfig.from_pretrained, "reward_model_path", config.reward_model_path)
        label_index(classifier.id2label, config.reward_label)


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


def parse_range(text: str) -> tuple[int, int]:
    """`LOW,HIGH` as two numbers. Raises UsageError if it is not that, or if no length lies between them."""
    try:
        low, high = (int(bound) for bound in text.split(","))
        if not 0 <= low <= high:
            raise ValueError(text)
    except ValueError:
        raise UsageError(f"--length_range is {text!r}, expected LOW,HIGH in words, 0 <= LOW <= HIGH") from None
    return low, high


def total_reward(
    terms: dict[str, RewardTerm], prompts: list[str], responses: list[str], rows: list[dict], config: Config
) -> tuple[TensorType["batch"], dict[str, TensorType["batch"]]]:
    """Σ_i w_i term_i for each response, with weight 1 for a term that is given none; and the terms by name.

    The sum is one to be raised, so a term's weight has the sign of what is wanted: above 0 for `reward_model`,
    `reward_fn` and `length` (at most 0: a penalty already), below 0 for `repetition` (at least 0, and worse if higher).
    """
    weights = parse_weights(config.reward_weights)
    values = {name: term(prompts, responses, rows) for name, term in terms.items()}
    return sum(weights.get(name, 1.0) * value for name, value in values.items()), values


def repetition(prompts: list[str], responses: list[str], rows: list[dict]) -> TensorType["batch", is_float]:
    """1 - unique / all words of each response, in [0, 1); words are lower-cased and split at white space.

    0 for an empty response as for a single word: nothing is said twice. That more is said is for `length` to ask.
    """
    words = [response.lower().split() for response in responses]
    return torch.tensor([1 - len(set(row)) / len(row) if row else 0.0 for row in words])


def length_term(low: int, high: int) -> RewardTerm:
    """A term that is 0 for a response of `low` to `high` words, both included, and -1 for a shorter or longer one."""

    def score(prompts: list[str], responses: list[str], rows: list[dict]) -> TensorType["batch"]:
        return torch.tensor([0.0 if low <= len(response.split()) <= high else -1.0 for response in responses])

    return score


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
    sys.modules[module_spec.name] = module  # where dataclasses and pickle look a module up
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"--reward_fn {path} cannot be run: {type(error).__name__}: {first_line(error)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"--reward_fn {path} has no function {name!r}{nearest(name, functions)}")

    def score(prompts: list[str], responses: list[str], rows: list[dict]) -> TensorType["batch"]:
        try:
            values = function(prompts, responses, rows)
        except (Exception, SystemExit) as error:
            raise RunError(f"--reward_fn {spec} raised {type(error).__name__}: {first_line(error)}") from error
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


class RewardModel:
    """A sequence classifier with its own tokenizer, and the one of its outputs that counts as reward."""

    def __init__(
        self, classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, label: str = "", output: str = "logit"
    ) -> None:
        """`label` as `label_index` reads it."""
        self.classifier = classifier.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.label = label_index(classifier.config.id2label, label)
        self.output = output

    @torch.no_grad()
    def __call__(self, texts: list[str], batch_size: int = 64) -> TensorType["batch", is_float]:
        """One reward a text, on the CPU: the label's `logit`, `logprob`, `probability`, or `margin` in log-odds.

        Texts beyond the classifier's length lose their beginning, because the response is at the end.
        """
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # rows of like length share a batch
        rewards = torch.empty(len(texts))
        for start in range(0, len(texts), batch_size):
            rows = order[start : start + batch_size]
            encoded = self.tokenizer([texts[i] for i in rows], padding=True, truncation=True, return_tensors="pt")
            encoded = {name: encoded[name].to(self.classifier.device) for name in ("input_ids", "attention_mask")}
            logits = self.classifier(**encoded).logits.float()
            rewards[rows] = reward_from_logits(logits, self.label, self.output).cpu()
        return rewards


def label_index(id2label: dict[int, str], label: str) -> int:
    """A label's index by name (any case) or number, "" for the last of one or two. Raises UsageError that names all."""
    indices = {str(index): index for index in id2label} | {name.lower(): index for index, name in id2label.items()}
    if label == "" and len(id2label) <= 2:
        return max(id2label)
    if label.lower() in indices:
        return indices[label.lower()]
    known = ", ".join(f"{index} ({name})" for index, name in id2label.items()) + nearest(label.lower(), indices)
    problem = f"{label!r} is none of" if label else "must name one of"
    raise UsageError(f"--reward_label {problem} the reward model's labels: {known}")


def reward_from_logits(
    logits: TensorType["batch", "labels", is_float], label: int, output: str
) -> TensorType["batch", is_float]:
    """z_l (`logit`), log p_l, p_l, or `margin` = log p_l - log(1 - p_l) = z_l - logsumexp of the other labels.

    A head with a single label (a regression) has nothing to compare with: it gives its logit whatever `output` says.
    """
    if output == "logit" or logits.shape[1] == 1:
        return logits[:, label]
    if output == "margin":
        others = torch.arange(logits.shape[1], device=logits.device) != label
        return logits[:, label] - logits[:, others].logsumexp(-1)
    logprobs = logits.log_softmax(-1)[:, label]
    return logprobs if output == "logprob" else logprobs.exp()


def load_reward_model(config: Config, path: str, device: torch.device) -> RewardModel:
    """The classifier at `path` as a reward. Raises UsageError if it has no such label, or a head without weights."""
    tokenizer = load_tokenizer(path, "reward_model_path")
    model_config = without_dropout(load(AutoConfig.from_pretrained, "reward_model_path", path))
    if model_config.pad_token_id is None:
        model_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = min(tokenizer.model_max_length, context_length(model_config))
    settings = {"config": model_config, "dtype": torch.float32} | quantized(device, config.reward_in_8bit)
    factory = AutoModelForSequenceClassification.from_pretrained
    classifier, found = load(factory, "reward_model_path", path, **settings, output_loading_info=True)
    if found["missing_keys"]:
        raise UsageError(f"--reward_model_path {path} is no classifier: it has no {min(found['missing_keys'])}")
    classifier = classifier if config.reward_in_8bit else classifier.to(device)
    return RewardModel(classifier, tokenizer, config.reward_label, config.reward_output)
