"""The `reward` stage: a classifier trained on labelled texts, or a reward model trained on pairs of answers.

It starts from a language model's trunk. The classifier also sees texts cut short, so that it knows how little a
beginning tells, and cannot be won over by one.
"""

import copy
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid
from torchtyping import TensorType, is_float
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from config import Config, UsageError
from dataset import check_column, column, distinct, load_rows, most_texts, pad
from device import prepare_device
from folders import notice, stage_folder
from intervals import wilson_interval
from loading import load_tokenizer, load_weights
from plot import plot_reliability
from probe import context_length, special_ends
from prompts import bare_ids, prompt_texts, text_ids
from provenance import Source, columns_read
from randomness import uniforms
from reward import PAIR_SEPARATOR, joined, padding_is_harmless, text_logits
from sft import fit, length_grouped, own_loss, save_stage, try_out


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

    The preferences' likelihood under Bradley and Terry's model: Ouyang et al. 2022 (arXiv:2203.02155), eq. 1.
    """
    return -logsigmoid(chosen - rejected).mean()


def pair_loss(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    """The loss of a batch whose first half holds the chosen texts and whose second half the rejected ones."""
    rewards = model(**batch).logits[:, 0]
    chosen, rejected = rewards.chunk(2)
    return bradley_terry_loss(chosen=chosen, rejected=rejected)


def pair_texts(rows: list[dict], config: Config, tokenizer) -> tuple[list[str], list[str]]:
    """Prompt and chosen answer of every row, and prompt and rejected answer."""
    prompts = prompt_texts(rows, config, tokenizer)
    better = column(rows, config.chosen_column, "chosen_column")
    worse = column(rows, config.rejected_column, "rejected_column")
    return joined(prompts, better, PAIR_SEPARATOR), joined(prompts, worse, PAIR_SEPARATOR)


def pair_batches(
    rows: list[dict], config: Config, tokenizer, length: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of chosen texts, then the rejected ones of the same rows; of a long one the last tokens."""
    chosen, rejected = pair_texts(rows, config, tokenizer)
    chosen_ids = text_ids(chosen, tokenizer, length)
    rejected_ids = text_ids(rejected, tokenizer, length)
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


def new_classifier(base_model: str, names: dict[int, str], pad_id: int, allow_pickle: bool = False) -> PreTrainedModel:
    """The base model's trunk under a new head with these labels. Raises UsageError for an encoder-decoder."""
    model = load_weights(
        AutoModelForSequenceClassification,
        "base_model_name",
        base_model,
        is_new=True,
        allow_pickle=allow_pickle,
        dtype=torch.float32,
        num_labels=len(names),
        id2label=names,
        problem_type="single_label_classification" if len(names) > 1 else "regression",  # whatever the base was for
        pad_token_id=pad_id,
    )
    model.config.get_text_config().pad_token_id = pad_id
    if model.config.is_encoder_decoder:
        raise UsageError(f"--task reward trains causal models and encoders here; {base_model} is neither")
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
    score = partial(text_logits, model, tokenizer, can_be_padded=can_be_padded)
    if config.chosen_column:
        chosen, rejected = pair_texts(rows, config, tokenizer)
        rewards = [score(texts)[:, 0] for texts in (rejected, chosen)]
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
            check_column(some_rows, config.chosen_column, "chosen_column")
            check_column(some_rows, config.rejected_column, "rejected_column")
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
    tokenizer = load_tokenizer(base_model, writes=False)
    rows = list(load_rows(config, "train", most_texts(config, "reward")))
    held_out = list(load_rows(config, "validation", 2000))
    names = {0: "REWARD"} if config.chosen_column else class_names(load_rows(config, "train"), config)
    model = new_classifier(base_model, names, tokenizer.pad_token_id, config.allow_pickle).to(device)
    length = min(context_length(model), config.context_length)
    if config.chosen_column:
        model.config.prompt_response_separator = PAIR_SEPARATOR  # saved with it, for those who score with it
        batches = pair_batches(rows=rows, config=config, tokenizer=tokenizer, length=length, device=device)
        loss = pair_loss
    else:
        batches = class_batches(rows=rows, config=config, tokenizer=tokenizer, length=length, device=device)
        loss = own_loss
    if config.dry_run:
        first = try_out(model, batches, "reward model", loss_of=loss)
        told = f"{len(rows):,} rows in {config.reward_steps:,} steps; the first loss is {first:.3f}"
        print(f"dry run: {folder} would be a reward model of {base_model}, on {told}")
        return folder
    fit(model, batches, config.reward_steps, config.reward_learning_rate, "reward model", loss_of=loss)
    reader = copy.deepcopy(tokenizer)  # it is told to cut and to pad, and the tokenizer is saved as it is
    reader.model_max_length = length  # of the texts that the model has learned from
    can_be_padded = padding_is_harmless(model, reader)
    results, figures = held_out_predictions(config, model, reader, held_out, can_be_padded)
    source = Source(columns_read(config, rows[0], *label_columns(config)), rows, held_out, start=base_model)
    save_stage(folder, model, tokenizer, config, source, **figures)
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
