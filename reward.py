"""Rewards: named terms, each a function of prompts, responses and rows, and their weighted sum.

A term is a sequence classifier (`reward_model`), a user's own function (`reward_fn`), the share of words that repeat
(`repetition`) or a penalty for a length out of range (`length`). What the score is worth beside the KL is for ppo.py.
"""

import copy
import importlib.util
import inspect
import itertools
import math
import os
import re
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid
from torchtyping import TensorType, is_float
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adapters import base_of, with_adapter
from config import DTYPES, Config, RunError, UsageError, first_line, nearest
from conversations import answered, chat_text, check_system, is_conversation
from dataset import pad
from encoding import template_ids, text_ids
from files import MANIFEST, read_object
from hub import has_file, load, prepare_config
from loading import load_tokenizer, load_under_head, load_weights, quantized
from probe import context_length, special_ends
from progress import tell

RewardTerm = Callable[[list[str], list[str], list[dict]], TensorType["batch"]]
TERMS = ("reward_model", "reward_fn", "repetition", "length")  # the names that --reward_weights may hold
LANGUAGE_MODELS = ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration")  # how the names of their classes end


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
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file() or Path(path).suffix != ".py":
        raise UsageError(f"--reward_fn {spec}: expected FILE.py:NAME with an existing file")
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
# The classifier
# --------------------------------------------------------------------------------------------------------------------

PAIR_SEPARATOR = "\n"  # between prompt and answer, where a reward model is trained here


def joined(prompts: list[str], responses: list[str], separator: str) -> list[str]:
    """The texts that a classifier reads, in its training as in PPO."""
    return [prompt + separator + response for prompt, response in zip(prompts, responses, strict=True)]


class Reading(NamedTuple):
    """How a classifier reads prompts and responses, in its training as in PPO: as which texts, and these as which ids.

    write: prompts, responses and rows -> texts; encode: texts, tokenizer and the most tokens -> ids.
    """

    write: Callable[[list[str], list, list[dict]], list[str]]
    encode: Callable[[list[str], PreTrainedTokenizerBase, int | None], list[list[int]]]


def reading_of(as_conversation: bool, separator: str, config: Config, tokenizer: PreTrainedTokenizerBase) -> Reading:
    """Of prompt and response as one text with the separator in between, or as a conversation that ends with the
    response, by the template of the classifier's tokenizer; a prompt of text is then a user's turn.
    """

    def joined_text(prompts: list[str], responses: list[str], rows: list[dict]) -> list[str]:
        return joined(prompts, responses, separator)

    def conversation_text(prompts: list[str], responses: list, rows: list[dict]) -> list[str]:
        texts = []
        for prompt, response, row in zip(prompts, responses, rows, strict=True):
            asked = row if is_conversation(row, config) else {config.prompt_column: prompt}
            texts.append(chat_text(answered(asked, response, config), row, tokenizer, add_generation_prompt=False))
        return texts

    return Reading(conversation_text, template_ids) if as_conversation else Reading(joined_text, text_ids)


@torch.no_grad()
def ids_logits(classifier: PreTrainedModel, rows: list[list[int]], pad_id: int) -> TensorType["rows", "labels"]:
    """The classifier's logits for some rows of ids in one pass, padded on the right."""
    ids, mask = pad(rows, pad_id, "right")
    outputs = classifier(input_ids=ids.to(classifier.device), attention_mask=mask.long().to(classifier.device))
    return outputs.logits.float().cpu()


def padding_is_harmless(classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether texts have the same logits beside a longer one as alone, as measured on three: some heads read the last
    column whatever it holds, some mix neighbouring tokens whatever the mask says.
    """
    before, behind = special_ends(tokenizer)
    room = min(12, tokenizer.model_max_length - len(before) - len(behind))
    vocabulary = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    words = vocabulary[:: max(1, len(vocabulary) // 12)][:room]
    pad_id = classifier.config.pad_token_id
    for length in (1, 2, 5):
        ids = before + words[:length] + behind
        alone = ids_logits(classifier, [ids], pad_id)
        beside = ids_logits(classifier, [ids, before + words + behind], pad_id)[:1]
        if not torch.allclose(alone, beside, rtol=1e-4, atol=1e-4):
            return False
    return True


def length_batches(lengths: list[int], batch_size: int, equal: bool) -> list[list[int]]:
    """The numbers of texts that share a pass: of like length, or of the very same one, which needs no padding."""
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    groups = [by_length]
    if equal:
        groups = [list(group) for _, group in itertools.groupby(by_length, key=lambda i: lengths[i])]
    return [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]


def text_logits(
    classifier: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    batch_size: int = 64,
    can_be_padded: bool = True,
    encode: Callable = text_ids,
) -> TensorType["batch", "labels", is_float]:
    """The classifier's logits on the CPU, each text's as if it were alone; `encode` as in `Reading`.

    A text beyond the tokenizer's `model_max_length` loses its beginning: the response is at the end.
    """
    logits = torch.empty(len(texts), classifier.config.num_labels)
    if not texts:
        return logits
    pad_id = getattr(classifier.config, "pad_token_id", tokenizer.pad_token_id)
    encoded = encode([text or " " for text in texts], tokenizer, tokenizer.model_max_length)
    encoded = [ids or [pad_id] for ids in encoded]  # of no token at all, a text could not be read
    for rows in length_batches([len(ids) for ids in encoded], batch_size, equal=not can_be_padded):
        logits[rows] = ids_logits(classifier, [encoded[i] for i in rows], pad_id)
    return logits


def label_index(id2label: dict[int, str], label: str) -> int:
    """A label's index by name (any case) or number, "" for the last of one or two. Raises UsageError that names all."""
    if sorted(id2label) != list(range(len(id2label))) or not all(isinstance(name, str) for name in id2label.values()):
        raise UsageError(f"the reward model's id2label is {id2label}, expected a name for each of 0, 1, ...")
    if label == "" and len(id2label) <= 2:
        return max(id2label)
    indices = {str(index): index for index in id2label}
    indices |= {name.lower(): index for index, name in id2label.items()}  # a name may be a number: then it is the name
    exact = {name: index for index, name in id2label.items()}
    if label in exact:
        return exact[label]
    if label.lower() in indices:
        return indices[label.lower()]
    known = ", ".join(f"{index} ({name})" for index, name in id2label.items())
    near = nearest(label.lower(), indices)
    raise UsageError(f"--reward_label must name one of the reward model's labels, not {label!r}: {known}{near}")


def reward_from_logits(
    logits: TensorType["batch", "labels", is_float], label: int, output: str, problem_type: str | None = None
) -> TensorType["batch"]:
    """z_l (`logit`), log p_l, p_l, or `margin` = log p_l - log(1 - p_l) = z_l - logsumexp of the other labels.

    p is the head's own: a softmax over the labels, or of a `multi_label_classification` (several may be true of a text)
    a sigmoid of each, whose margin is z_l itself. A head with a single label, or of a `regression`, has nothing to
    compare with: it gives its logit whatever `output` says.
    """
    z = logits[:, label]
    if output == "logit" or logits.shape[1] == 1 or problem_type == "regression":
        return z
    independent = problem_type == "multi_label_classification"
    if output == "margin":
        is_other = torch.arange(logits.shape[1]) != label
        return z if independent else z - logits[:, is_other].logsumexp(-1)
    logprobs = logsigmoid(z) if independent else logits.log_softmax(-1)[:, label]
    return logprobs if output == "logprob" else logprobs.exp()


def prepare_padding(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Texts are padded with what the classifier's configuration takes for padding, by which heads find a text's last
    token: with the tokenizer's pad id only where it has none, or one that it does not embed.
    """
    text_config = config.get_text_config()
    pad_id = text_config.pad_token_id
    if pad_id is None or not 0 <= pad_id < text_config.vocab_size:
        pad_id = tokenizer.pad_token_id
    text_config.pad_token_id = config.pad_token_id = pad_id


def load_classifier(
    config: Config, path: str, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> PreTrainedModel:
    """The classifier at `path`, frozen, in float32; an adapter on the base weights that it was trained on. Raises
    UsageError for a model without a head, or another weight.
    """
    model_config = prepare_config(load(AutoConfig.from_pretrained, "reward_model_path", path))
    prepare_padding(model_config, tokenizer)
    if base_of(path) != path:
        return load_adapted(config, path, model_config, device).requires_grad_(False).eval()
    settings = {"config": model_config, "dtype": torch.float32} | quantized(
        device, config.reward_in_8bit, outliers_from=6.0
    )
    settings["allow_pickle"] = config.allow_pickle
    settings["expected"] = "a model saved for sequence classification, or --reward_fn"
    classifier = load_weights(AutoModelForSequenceClassification, "reward_model_path", path, **settings)
    if not config.reward_in_8bit:
        classifier = classifier.to(device)
    return classifier.requires_grad_(False).eval()


def check_says_labels(path: str) -> None:
    """Raise UsageError for a folder that holds an adapter alone, without the configuration of a classifier."""
    base = base_of(path)
    if base != path and not has_file(path, "config.json"):
        raise UsageError(
            f"--reward_model_path {path} is an adapter of {base} without a classifier's config.json, which has the "
            "labels: expected one that --task reward has saved, or a whole model (merge_and_unload of peft)"
        )


def check_is_no_language_model(own: PretrainedConfig, path: str) -> None:
    """Raise UsageError for what was saved as a language model: before a stage is trained, and not when it is loaded."""
    said = own.architectures or []
    if said and all(name.endswith(LANGUAGE_MODELS) for name in said):
        raise UsageError(
            f"--reward_model_path {path} is a language model ({', '.join(said)}); expected a model saved for sequence "
            "classification, or --reward_fn"
        )


def load_adapted(config: Config, path: str, model_config: PretrainedConfig, device: torch.device) -> PreTrainedModel:
    """The classifier whose adapter and head are at `path`, on the base model's weights in as many bits as they were
    trained on, or with --reward_in_8bit in 8.
    """
    base = base_of(path)
    manifest = Path(path) / MANIFEST
    found = read_object(manifest).get("base_weights") if manifest.exists() else None
    weights = found if isinstance(found, dict) else {}
    in_4bit = weights.get("load_in_4bit") is True
    in_8bit = weights.get("load_in_8bit") is True or (config.reward_in_8bit and not in_4bit)
    dtype = weights.get("dtype") if weights.get("dtype") in DTYPES else "float32"
    classifier = load_under_head(model_config, base, dtype, device, in_8bit, in_4bit, allow_pickle=config.allow_pickle)
    return with_adapter(classifier, path, base, config.allow_pickle, flag="reward_model_path")


def load_reward_model(config: Config, path: str, device: torch.device) -> Callable[..., TensorType["batch"]]:
    """The classifier at `path`, from texts, and how to `encode` them, to rewards.

    Raises UsageError for a label or head that it does not have.
    """
    check_says_labels(path)
    tokenizer = load_tokenizer(path, "reward_model_path", writes=False)
    classifier = load_classifier(config, path, tokenizer, device)
    label = label_index(classifier.config.id2label, config.reward_label)
    tokenizer.model_max_length = min(tokenizer.model_max_length, context_length(classifier))
    passes = {"can_be_padded": padding_is_harmless(classifier, tokenizer)}
    if config.reward_in_8bit:
        passes["batch_size"] = 1  # its products round by what the whole batch holds

    def reward_model(texts: list[str], encode: Callable = text_ids) -> TensorType["batch"]:
        logits = text_logits(classifier, tokenizer, texts, encode=encode, **passes)
        rewards = reward_from_logits(logits, label, config.reward_output, classifier.config.problem_type)
        for text, reward in zip(texts, rewards.tolist(), strict=True):
            if not math.isfinite(reward):
                raise RunError(f"--reward_model_path {path} gives {reward} for {text[:80]!r}, expected a finite number")
        return rewards

    return reward_model


def own_reading(config: Config, path: str, separator: str) -> Reading:
    """How the classifier at `path` reads prompt and response: as its config.json says that it was trained, by
    `reads_conversations` and `prompt_response_separator`.

    Where that says nothing: conversations by its tokenizer's template, where it has one, which is told, as a model may
    have inherited it; anything else as text with the `separator` of the policy in between.
    """
    own = load(AutoConfig.from_pretrained, "reward_model_path", path)
    tokenizer = load_tokenizer(path, "reward_model_path", writes=False)
    as_conversation = getattr(own, "reads_conversations", None)
    says = as_conversation is not None or hasattr(own, "prompt_response_separator")
    if not says and tokenizer.chat_template:
        as_conversation = config.chat
        how = "conversations by its own template of chat" if config.chat else "prompts as text, which are no messages"
        tell(f"note: {path} reads {how}; reads_conversations in its config.json would say how it was trained")
    if as_conversation and not tokenizer.chat_template:
        raise UsageError(f"--reward_model_path {path} reads conversations, and its tokenizer has no template for them")
    if as_conversation:
        check_system(tokenizer, config)
    separator = getattr(own, "prompt_response_separator", separator)
    return reading_of(bool(as_conversation), separator, config, tokenizer)


def classifier_term(config: Config, path: str, device: torch.device, separator: str) -> RewardTerm:
    """The classifier on the response, or on prompt and response in its `own_reading`."""
    score = load_reward_model(config, path, device)
    if config.reward_input == "response":
        return lambda prompts, responses, rows: score(responses)
    reading = own_reading(config, path, separator)
    return lambda prompts, responses, rows: score(reading.write(prompts, responses, rows), reading.encode)


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
