"""The `reward` stage: a classifier trained on labelled texts, or a reward model trained on pairs of answers.

It starts from a language model's trunk. The classifier also sees texts cut short, so that it knows how little a
beginning tells, and cannot be won over by one.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid
from torchtyping import TensorType, is_float
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from checkpoint import stage_folder
from config import Config, UsageError
from dataset import column, load_rows, pad, prompt_texts
from device import prepare_device
from loading import context_length, load, load_tokenizer
from plot import plot_reliability
from reward import text_logits
from sft import fit, length_grouped, own_loss, save_stage


def classifier_batch(
    texts: list[list[int]], labels: list[int], pad_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    ids, mask = pad(texts, pad_id, "right")
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.tensor(labels)}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def cut_short(ids: list[int], length: int, generator: torch.Generator) -> list[int]:
    """The text, or for half of the draws its beginning, of a random number of tokens; of that, the last `length`."""
    whole, end = torch.rand(2, generator=generator).tolist()
    kept = len(ids) if whole < 0.5 else math.ceil(end * len(ids))
    return ids[:kept][-length:]


def class_names(rows: list[dict], config: Config) -> dict[int, str]:
    """The classes of the label column by number. Raises UsageError unless they are 0, 1, ..., two at least."""
    labels = sorted(set(column(rows, config.label_column, "label_column", int)))
    if labels != list(range(len(labels))) or len(labels) < 2 or isinstance(labels[0], bool):
        raise UsageError(f"--label_column {config.label_column!r} holds {labels[:5]}, expected 0, 1, ...")
    return {label: {0: "NEGATIVE", 1: "POSITIVE"}.get(label, str(label)) for label in labels}


def special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind a text."""
    whole, bare = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def bradley_terry_loss(
    chosen: TensorType["pairs", is_float], rejected: TensorType["pairs", is_float]
) -> TensorType[()]:
    """-mean log σ(r_chosen - r_rejected): a better answer is worth more; adding a constant to both changes nothing.

    The preferences' likelihood under Bradley and Terry's model: Ouyang et al. 2022 (arXiv:2203.02155), eq. 1.
    """
    return -logsigmoid(chosen - rejected).mean()


def pair_loss(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    """The loss of a batch whose first half holds the chosen texts and whose second half the rejected ones."""
    return bradley_terry_loss(*model(**batch).logits[:, 0].chunk(2))


def pair_texts(rows: list[dict], config: Config, tokenizer) -> tuple[list[str], list[str]]:
    """Prompt and chosen answer of every row, and prompt and rejected answer."""
    prompts = prompt_texts(rows, config, tokenizer)
    chosen, rejected = (column(rows, getattr(config, flag), flag) for flag in ("chosen_column", "rejected_column"))
    return tuple([f"{p}\n{answer}" for p, answer in zip(prompts, side, strict=True)] for side in (chosen, rejected))


def pair_batches(
    rows: list[dict], config: Config, tokenizer, length: int, device: torch.device, generator: torch.Generator
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of chosen texts, then the rejected ones of the same rows; of a long one the last `length`."""
    sides = [tokenizer(side, add_special_tokens=False).input_ids for side in pair_texts(rows, config, tokenizer)]
    before, behind = special_ends(tokenizer)
    pairs = [[before + ids[-length:] + behind for ids in pair] for pair in zip(*sides, strict=True)]
    for group in length_grouped([len(a) + len(b) for a, b in pairs], config.reward_batch_size, generator):
        texts = [pairs[i][side] for side in (0, 1) for i in group]
        yield classifier_batch(texts, [0] * len(texts), tokenizer.pad_token_id, device)


def class_batches(
    rows: list[dict], config: Config, tokenizer, length: int, device: torch.device, generator: torch.Generator
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of labelled texts, half of them cut short."""
    labels = column(rows, config.label_column, "label_column", int)
    texts = tokenizer(column(rows, config.prompt_column, "prompt_column"), add_special_tokens=False).input_ids
    before, behind = special_ends(tokenizer)
    for group in length_grouped([len(text) for text in texts], config.reward_batch_size, generator):
        cut = [before + cut_short(texts[i], length, generator) + behind for i in group]
        yield classifier_batch(cut, [labels[i] for i in group], tokenizer.pad_token_id, device)


def run_reward(config: Config, base_model: str) -> Path:
    """The `reward` stage: a classifier of labelled texts, or of pairs the reward model that prefers the chosen ones.

    Prints the held-out accuracy, draws how far the model's own certainty can be relied on, and saves all whole.
    """
    folder, device, tokenizer = stage_folder(config, "reward"), prepare_device(config), load_tokenizer(base_model)
    rows, held_out = load_rows(config, "train"), load_rows(config, "validation", 2000)
    names = {0: "REWARD"} if config.chosen_column else class_names(rows, config)
    settings = {"num_labels": len(names), "id2label": names, "pad_token_id": tokenizer.pad_token_id}
    factory = AutoModelForSequenceClassification.from_pretrained
    model = load(factory, "base_model_name", base_model, dtype=torch.float32, **settings).to(device)
    if model.config.is_encoder_decoder:
        raise UsageError(f"--task reward trains causal models and encoders here; {base_model} is neither")
    length = min(context_length(model.config), config.context_length)
    room = length - sum(map(len, special_ends(tokenizer)))
    make, loss = (pair_batches, pair_loss) if config.chosen_column else (class_batches, own_loss)
    generator = torch.Generator().manual_seed(config.seed)
    batches = make(rows, config, tokenizer, room, device, generator)
    fit(model, batches, config.reward_steps, config.reward_learning_rate, "reward model", loss)
    save_stage(folder, model, tokenizer, config)
    tokenizer.model_max_length = length  # of the texts that it has learned from
    (certainty, right), accuracy = held_out_predictions(config, model, tokenizer, held_out)
    figure = plot_reliability(folder, certainty.tolist(), right.tolist())
    print(f"reward model: held-out accuracy {accuracy}, in {folder} (reliability: {figure})")
    return folder


def held_out_predictions(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict]
) -> tuple[tuple[torch.Tensor, torch.Tensor], str]:
    """The `predictions` for pairs or whole texts; and how many are right, also on first halves of texts, in letters."""
    if config.chosen_column:
        chosen, rejected = (text_logits(model, tokenizer, side)[:, 0] for side in pair_texts(rows, config, tokenizer))
        pairs = predictions(torch.stack([rejected, chosen], dim=1), [1] * len(rows))  # σ(Δr), as in the loss
        return pairs, f"{pairs[1].float().mean():.1%} of {len(rows)} pairs"
    labels = column(rows, config.label_column, "label_column", int)
    texts = column(rows, config.prompt_column, "prompt_column")
    halves = [text[: math.ceil(len(text) / 2)] for text in texts]
    whole, half = (predictions(text_logits(model, tokenizer, some), labels) for some in (texts, halves))
    return whole, f"{whole[1].float().mean():.1%} on whole texts, {half[1].float().mean():.1%} on their first halves"


def predictions(logits: TensorType["rows", "labels", is_float], labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The probability of each row's likeliest label, and whether that label is right."""
    probability, label = logits.softmax(-1).max(-1)
    return probability, label == torch.tensor(labels)
