"""A classifier as the reward: how it reads prompt and response, and the number that its logits make of them."""

import itertools
import math
from collections.abc import Callable
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
from config import DTYPES, Config, RunError, UsageError, nearest
from conversations import answered, chat_text, check_system, is_conversation
from dataset import pad
from encoding import template_ids, text_ids
from files import MANIFEST, read_object
from hub import has_file, load, prepare_config
from loading import load_tokenizer, load_under_head, load_weights, quantized
from probe import context_length, special_ends
from progress import tell

LANGUAGE_MODELS = ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration")  # how the names of their classes end
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


def classifier_term(
    config: Config, path: str, device: torch.device, separator: str
) -> Callable[..., TensorType["batch"]]:
    """The classifier on the response, or on prompt and response in its `own_reading`."""
    score = load_reward_model(config, path, device)
    if config.reward_input == "response":
        return lambda prompts, responses, rows: score(responses)
    reading = own_reading(config, path, separator)
    return lambda prompts, responses, rows: score(reading.write(prompts, responses, rows), reading.encode)
