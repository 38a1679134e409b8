"""The `reward` stage: a classifier trained on labelled texts, or a reward model trained on pairs of answers.

It starts from a language model's trunk. The classifier also sees texts cut short, so that it knows how little a
beginning tells, and cannot be won over by one.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid
from torchtyping import TensorType, is_float
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from adapters import adapter_to_add, with_adapter, with_its_adapter
from config import Config, UsageError
from conversations import check_answers, check_template
from dataset import check_column, column, distinct, load_rows, most_texts, pad
from device import prepare_device, products, settle_precision
from encoding import bare_ids
from fitting import fit, length_grouped, levers, part_of, try_out
from folders import notice, stage_folder
from hub import load
from intervals import wilson_interval
from loading import load_tokenizer, load_under_head, recompute_activations, to_be_trained
from plot import plot_reliability
from probe import context_length, is_exact, special_ends
from prompts import prompt_texts
from provenance import Source, columns_read
from randomness import uniforms
from reward_model import PAIR_SEPARATOR, Reading, padding_is_harmless, reading_of, text_logits
from sft import save_stage


def classifier_batch(
    texts: list[list[int]], labels: list[int], pad_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    ids, mask = pad(texts, pad_id, "right")
    labels = torch.tensor(labels)
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device), "labels": labels.to(device)}


def cut_short(ids: list[int], length: int, whole: float, end: float) -> list[int]:
    """The text where `whole` < 1/2, else its beginning up to the share `end` of it; of that, the last `length` tokens.

    With both drawn at random from [0, 1), every other text is a beginning, of any number of tokens alike.
    """
    if whole >= 0.5:
        ids = ids[: math.ceil(end * len(ids))]
    return ids[-length:]


def class_names(rows: list[dict], config: Config) -> dict[int, str]:
    """The classes of the label column by number. Raises UsageError unless they are 0, 1, ..., two at least."""
    check_column(rows, config.label_column, "label_column", int)
    labels = sorted(distinct(rows, config.label_column))
    if labels != list(range(len(labels))) or len(labels) < 2 or isinstance(labels[0], bool):
        raise UsageError(f"--label_column {config.label_column!r} holds {labels[:5]}, expected 0, 1, ...")
    names = {label: str(label) for label in labels}
    names[0] = "NEGATIVE"
    names[1] = "POSITIVE"
    return names


def bradley_terry_loss(
    chosen: TensorType["pairs", is_float], rejected: TensorType["pairs", is_float]
) -> TensorType[()]:
    """-mean log σ(r_chosen - r_rejected): a better answer is worth more; adding a constant to both changes nothing.

    The preferences' likelihood under Bradley and Terry's model: Stiennon et al. 2020 (arXiv:2009.01325), section 3.4,
    and with K = 2, Ouyang et al. 2022 (arXiv:2203.02155), eq. 1.
    """
    return -logsigmoid(chosen - rejected).mean()


def pair_loss(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    """The loss of a batch whose first half holds the chosen texts and whose second half the rejected ones."""
    rewards = model(**batch).logits[:, 0]
    chosen, rejected = rewards.chunk(2)
    return bradley_terry_loss(chosen=chosen, rejected=rejected)


def pairs_in_passes(batch: dict, most_rows: int) -> list[dict]:
    """`in_passes` for a batch whose first half holds the chosen texts: a pair's two share a pass."""
    n_pairs = len(batch["labels"]) // 2
    most_pairs = max(1, most_rows // 2)
    if n_pairs <= most_pairs:
        return [batch]
    passes = []
    for start in range(0, n_pairs, most_pairs):
        chosen = list(range(n_pairs))[start : start + most_pairs]
        passes.append(part_of(batch, chosen + [n_pairs + pair for pair in chosen]))
    return passes


def pair_reading(config: Config, tokenizer: PreTrainedTokenizerBase) -> Reading:
    """How a reward model that is trained here on pairs reads them: conversations by its own template, else as text."""
    return reading_of(config.chat, PAIR_SEPARATOR, config, tokenizer)


def pair_texts(rows: list[dict], config: Config, tokenizer) -> tuple[list[str], list[str]]:
    """Prompt and chosen answer of every row, and prompt and rejected answer."""
    kinds = (str, list) if config.chat else str
    better = column(rows, config.chosen_column, "chosen_column", kinds)
    worse = column(rows, config.rejected_column, "rejected_column", kinds)
    if config.chat:
        check_template(tokenizer, config, rows[0])
        prompts = [""] * len(rows)  # a conversation is read from its row
    else:
        prompts = prompt_texts(rows, config, tokenizer)
    reading = pair_reading(config, tokenizer)
    return reading.write(prompts, better, rows), reading.write(prompts, worse, rows)


def pair_batches(
    rows: list[dict], config: Config, tokenizer, length: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of chosen texts, then the rejected ones of the same rows; of a long one the last tokens."""
    chosen, rejected = pair_texts(rows, config, tokenizer)
    encode = pair_reading(config, tokenizer).encode
    chosen_ids = encode(chosen, tokenizer, length)
    rejected_ids = encode(rejected, tokenizer, length)
    n_full = sum(len(ids) >= length for ids in chosen_ids + rejected_ids)
    if n_full:
        told = f"{n_full} of {2 * len(rows)} answers with their prompts fill the {length} tokens that are learned from"
        print(f"{told}: longer ones have lost their beginning (--context_length)")
    lengths = [len(a) + len(b) for a, b in zip(chosen_ids, rejected_ids, strict=True)]
    for group in length_grouped(lengths, config.reward_batch_size, config.seed):
        texts = [chosen_ids[i] for i in group] + [rejected_ids[i] for i in group]
        yield classifier_batch(texts, [0] * len(texts), tokenizer.pad_token_id, device)


def class_batches(
    rows: list[dict], config: Config, tokenizer, length: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of labelled texts of `length` tokens at most, half of them cut short."""
    labels = column(rows, config.label_column, "label_column", int)
    texts = column(rows, config.prompt_column, "prompt_column")
    with_tokens = [(ids, label) for ids, label in zip(bare_ids(texts, tokenizer), labels, strict=True) if ids]
    encoded = [ids for ids, _ in with_tokens]
    labels = [label for _, label in with_tokens]
    before, behind = special_ends(tokenizer)
    room = length - len(before) - len(behind)
    groups = length_grouped([len(ids) for ids in encoded], config.reward_batch_size, config.seed)
    for number, group in enumerate(groups):
        cuts = uniforms(config.seed, "cuts", number, (len(group), 2)).tolist()
        parts = []
        for i, (whole, end) in zip(group, cuts, strict=True):
            part = cut_short(encoded[i], room, whole=whole, end=end)
            parts.append(before + part + behind)
        yield classifier_batch(parts, [labels[i] for i in group], tokenizer.pad_token_id, device)


def new_classifier(
    config: Config, base_model: str, names: dict[int, str], pad_id: int, device: torch.device
) -> PreTrainedModel:
    """The base model's trunk under a new head with these labels; under an adapter where the config asks for one, or the
    base model is one, which then goes on as the classifier's. Where all is made from nothing, all of it is trained.

    Raises UsageError for an encoder-decoder.
    """
    if config.trains_from_scratch:
        config = replace(config, lora_r=0, load_in_8bit=False, load_in_4bit=False)
    base, adapter = with_its_adapter(base_model, adapter_to_add(config, base_model))
    model_config = load(
        AutoConfig.from_pretrained,
        "base_model_name",
        base,
        num_labels=len(names),
        id2label=names,
        label2id={name: label for label, name in names.items()},
        problem_type="single_label_classification" if len(names) > 1 else "regression",  # whatever the base was for
        pad_token_id=pad_id,
    )
    model_config.get_text_config().pad_token_id = pad_id
    if model_config.is_encoder_decoder:
        raise UsageError(f"--task reward trains causal models and encoders here; {base_model} is neither")
    bits = (config.load_in_8bit, config.load_in_4bit)
    model = load_under_head(model_config, base, config.dtype, device, *bits, allow_pickle=config.allow_pickle)
    if adapter:
        model = with_adapter(model, adapter, base, config.allow_pickle, has_new_head=True)
    model = to_be_trained(model, config)
    recompute_activations(model, config)
    return model


class Predictions(NamedTuple):
    certainty: TensorType["rows", is_float]  # the probability of each row's likeliest label
    is_right: TensorType["rows", bool]  # whether it is the row's label


def predictions(logits: TensorType["rows", "labels", is_float], labels: list[int]) -> Predictions:
    probability, label = logits.softmax(-1).max(-1)
    return Predictions(certainty=probability, is_right=label == torch.tensor(labels))


def held_out_predictions(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    can_be_padded: bool = True,
) -> tuple[Predictions, dict[str, float]]:
    """The `predictions` for pairs or whole texts; and by name which share of them is right, and of first halves."""
    score = partial(text_logits, model, tokenizer, batch_size=config.mini_batch_size, can_be_padded=can_be_padded)
    if config.chosen_column:
        chosen, rejected = pair_texts(rows, config, tokenizer)
        encode = pair_reading(config, tokenizer).encode
        rewards = [score(texts, encode=encode)[:, 0] for texts in (rejected, chosen)]
        pairs = predictions(torch.stack(rewards, dim=1), [1] * len(rows))  # the probability is σ(Δr), as in the loss
        return pairs, {"accuracy": share_right(pairs)}
    labels = column(rows, config.label_column, "label_column", int)
    texts = column(rows, config.prompt_column, "prompt_column")
    first_halves = [text[: math.ceil(len(text) / 2)] for text in texts]
    whole = predictions(score(texts), labels)
    half = predictions(score(first_halves), labels)
    return whole, {"accuracy": share_right(whole), "accuracy_on_first_halves": share_right(half)}


def share_right(results: Predictions) -> float:
    return results.is_right.double().mean().item()


def told_accuracy(accuracy: float, n_rows: int, accuracy_on_first_halves: float | None = None) -> str:
    """What `held_out_predictions` measured, in words: on pairs, where there are no first halves."""
    if accuracy_on_first_halves is None:
        return f"{accuracy:.1%} of {n_rows} pairs"
    return f"{accuracy:.1%} on whole texts, {accuracy_on_first_halves:.1%} on their first halves"


def label_columns(config: Config) -> list[str]:
    """The columns that a reward model reads beside the text's."""
    return [config.chosen_column, config.rejected_column] if config.chosen_column else [config.label_column]


def check_labels(rows: list[dict], held_out: list[dict], config: Config) -> None:
    """Raise UsageError unless both have the answers of a reward model of pairs, or classes from 0 of a classifier."""
    if config.chosen_column:
        for some_rows in (rows, held_out):
            check_answers(some_rows, config.chosen_column, "chosen_column", config)
            check_answers(some_rows, config.rejected_column, "rejected_column", config)
        return
    known = class_names(rows, config)
    for label in column(held_out, config.label_column, "label_column", int):
        if label not in known:
            raise UsageError(
                f"--label_column {config.label_column!r} holds {label} in held-out rows, which no row to train on has"
            )


def run_reward(config: Config, base_model: str) -> Path:
    """The `reward` stage: a classifier of labelled texts, or of pairs the reward model that prefers the chosen ones.

    Prints the held-out accuracy, draws how far the model's own certainty can be relied on, and saves all whole. A dry
    run makes all of it but the steps, and leaves nothing.
    """
    folder = stage_folder(config, "reward")
    device = prepare_device(config)
    tokenizer = load_tokenizer(base_model, adapter=adapter_to_add(config, base_model), writes=False)
    rows = list(load_rows(config, "train", most_texts(config, "reward")))
    held_out = list(load_rows(config, "validation", 2000))
    names = {0: "REWARD"} if config.chosen_column else class_names(load_rows(config, "train"), config)
    model = new_classifier(config, base_model, names, tokenizer.pad_token_id, device)
    length = min(context_length(model), config.context_length)
    work = products(config.reward_batch_size * length)
    settle_precision(model, work, config)
    model.config.reads_conversations = bool(config.chosen_column) and config.chat  # saved, for those who score with it
    if config.chosen_column:
        model.config.prompt_response_separator = PAIR_SEPARATOR
        batches = pair_batches(rows=rows, config=config, tokenizer=tokenizer, length=length, device=device)
        passes_of = partial(pairs_in_passes, most_rows=config.mini_batch_size)
        objective = levers(config) | {"loss_of": pair_loss, "passes_of": passes_of}
    else:
        batches = class_batches(rows=rows, config=config, tokenizer=tokenizer, length=length, device=device)
        objective = levers(config)
    if config.dry_run:
        first = try_out(model, batches, "reward model", **objective)
        told = f"{len(rows):,} rows in {config.reward_steps:,} steps; the first loss is {first:.3f}"
        print(f"dry run: {folder} would be a reward model of {base_model}, on {told}")
        return folder
    fit(model, batches, config.reward_steps, config.reward_learning_rate, "reward model", **objective)
    reader = copy.deepcopy(tokenizer)  # it is told to cut and to pad, and the tokenizer is saved as it is
    reader.model_max_length = length  # of the texts that the model has learned from
    can_be_padded = padding_is_harmless(model, reader)
    results, figures = held_out_predictions(config, model, reader, held_out, can_be_padded)
    source = Source(columns_read(config, rows[0], *label_columns(config)), rows, held_out, start=base_model)
    # An adapter is folded in where that rounds nothing, and what is saved scores as what was trained.
    save_stage(folder, "reward", model, tokenizer, config, source, merge=is_exact(model), **figures)
    certainties, is_right = results.certainty.tolist(), results.is_right.tolist()
    figure = plot_reliability(folder, certainties, is_right, n_labels=max(2, len(names)), notice=notice(config))
    n_right, chance = sum(is_right), 1 / max(2, len(names))
    if wilson_interval(n_right, len(is_right))[0] <= chance:
        print(
            "warning: the reward model may be no better than chance: "
            f"it is right about {n_right} of {len(is_right)} held-out rows"
        )
    accuracy = told_accuracy(n_rows=len(held_out), **figures)
    print(f"reward model: held-out accuracy {accuracy}, in {folder} (reliability: {figure})")
    return folder
