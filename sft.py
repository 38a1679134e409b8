"""The stages before PPO: a language model trained on texts, and a classifier of them to serve as reward.

Both are supervised training by one loop, `fit`. The language model is the policy's start and its reference; the
classifier starts from the language model's trunk and also sees texts cut short, so that it knows how little a
beginning tells, and cannot be won over by one.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from checkpoint import stage_folder, whole_folder, write_whole
from config import Config, RunError, UsageError, to_json
from dataset import column, load_rows, pad
from loading import (
    context_length,
    load,
    load_language_model,
    load_tokenizer,
    new_language_model,
    new_tokenizer,
    pick_device,
)
from reward import check_weights, load_reward_function

IGNORED = -100  # the label that cross-entropy leaves out


def fit(model: PreTrainedModel, batches: Iterator[dict], steps: int, learning_rate: float, name: str) -> float:
    """Minimise the model's own loss by AdamW: a tenth of warm-up, then linearly to 0. Returns the recent mean loss."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.98), fused=True)
    warm_up = math.ceil(steps / 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    model.train()
    recent = 0.0
    bar = tqdm(range(steps), desc=name, unit="step")
    for step in bar:
        loss = model(**next(batches)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = loss.item() if step == 0 else 0.95 * recent + 0.05 * loss.item()
        if not math.isfinite(recent):
            raise RunError(f"the loss of the {name} is {recent} at step {step}; try a lower learning rate")
        bar.set_postfix(loss=f"{recent:.3f}", refresh=False)
    model.eval()
    return recent


def length_grouped(lengths: list[int], batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless batches of indices of texts of like length, in random order: little padding, every text once a pass."""
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        pools = [order[i : i + 32 * batch_size] for i in range(0, len(order), 32 * batch_size)]
        ordered = [i for pool in pools for i in sorted(pool, key=lambda i: lengths[i])]
        batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[number]


def token_pieces(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """The texts as ids, each ended by EOS and cut into pieces of at most `length`.

    A long text's last piece reaches back to be of full length: a short rest would teach the model to end at once.
    """
    pieces = []
    for ids in tokenizer(texts, add_special_tokens=False).input_ids:
        whole = [*ids, tokenizer.eos_token_id]
        last = max(0, len(whole) - length)
        pieces += [whole[min(start, last) :][:length] for start in range(0, len(whole), length)]
    return [piece for piece in pieces if len(piece) > 1]


def language_batch(pieces: list[list[int]], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Inputs of a causal model that predicts every real token of the pieces after the first."""
    ids, mask = pad(pieces, pad_id, "right")
    labels = torch.where(mask, ids, IGNORED)
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device), "labels": labels.to(device)}


@torch.no_grad()
def perplexity(model: PreTrainedModel, pieces: list[list[int]], pad_id: int) -> float:
    """exp of the mean negative log-likelihood a token, over all predicted tokens of the pieces."""
    total = count = 0.0
    for start in range(0, len(pieces), 64):
        batch = language_batch(pieces[start : start + 64], pad_id, model.device)
        predicted = (batch["labels"][:, 1:] != IGNORED).sum().item()
        total += model(**batch).loss.item() * predicted
        count += predicted
    return math.exp(total / count)


def train_language_model(
    config: Config, texts: list[str], tokenizer: PreTrainedTokenizerBase, name: str
) -> PreTrainedModel:
    """A language model trained on texts: --base_model_name fine-tuned, or a small GPT-2 from scratch."""
    device = pick_device(config.device)
    if config.trains_from_scratch:
        model = new_language_model(config, tokenizer).to(device)
    else:
        model = load_language_model(config.base_model_name, "float32", device)
    if model.config.is_encoder_decoder:
        raise UsageError(f"--task sft trains causal models here; {config.base_model_name} is an encoder-decoder")
    pieces = token_pieces(texts, tokenizer, min(context_length(model.config), config.context_length))
    if not pieces:
        raise UsageError(f"--prompt_column {config.prompt_column!r} holds no text to train on")
    generator = torch.Generator().manual_seed(config.seed)
    groups = length_grouped([len(piece) for piece in pieces], config.sft_batch_size, generator)
    batches = (language_batch([pieces[i] for i in group], tokenizer.pad_token_id, device) for group in groups)
    fit(model, batches, config.sft_steps, config.sft_learning_rate, name)
    return model


def check_before_training(config: Config, trains_reward: bool) -> None:
    """Refuse, before minutes of training, what would be refused after them: data, columns, weights, lengths."""
    check_weights(config)
    if config.reward_fn:
        load_reward_function(config.reward_fn)
    rows = load_rows(config, "train", None if config.dataset_path or trains_reward else 1)
    column(rows, config.prompt_column, "prompt_column")
    load_rows(config, "validation", 1)
    if trains_reward:
        class_names(rows, config)
    longest = config.max_prompt_length + config.max_new_tokens
    if config.task == "train" and config.trains_from_scratch and longest > config.context_length:
        raise UsageError(
            f"--max_prompt_length {config.max_prompt_length} plus --max_new_tokens {config.max_new_tokens} "
            f"is more than the {config.context_length} tokens of --context_length"
        )


def run_sft(config: Config) -> Path:
    """The `sft` stage: train the language model, print its held-out perplexity, and save it whole."""
    folder = stage_folder(config, "sft")
    texts = column(load_rows(config, "train"), config.prompt_column, "prompt_column")
    held_out = column(load_rows(config, "validation", 1000), config.prompt_column, "prompt_column")
    if config.trains_from_scratch:
        tokenizer = new_tokenizer(texts, config.vocab_size, config.context_length)
    else:
        tokenizer = load_tokenizer(config.base_model_name)
    model = train_language_model(config, texts, tokenizer, "language model")
    pieces = token_pieces(held_out, tokenizer, min(context_length(model.config), config.context_length))
    result = perplexity(model, pieces, tokenizer.pad_token_id)
    with whole_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        write_whole(scratch / "run_config.json", to_json(config))
    print(
        f"language model: held-out perplexity {result:.2f} a token, {model.num_parameters():,} parameters, in {folder}"
    )
    return folder


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


@torch.no_grad()
def accuracy(model: PreTrainedModel, texts: list[list[int]], labels: list[int], pad_id: int) -> float:
    """Share of the texts whose likeliest label is their own."""
    right = 0
    for start in range(0, len(texts), 64):
        batch = classifier_batch(texts[start : start + 64], labels[start : start + 64], pad_id, model.device)
        right += (model(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
    return right / len(texts)


def run_reward(config: Config, language_model_path: str) -> Path:
    """The `reward` stage: train a classifier of the labelled texts, print its held-out accuracy, and save it whole."""
    folder = stage_folder(config, "reward")
    device = pick_device(config.device)
    tokenizer = load_tokenizer(language_model_path)
    train, held_out = load_rows(config, "train"), load_rows(config, "validation", 2000)
    labels, names = column(train, config.label_column, "label_column", int), class_names(train, config)
    settings = {"num_labels": len(names), "id2label": names, "pad_token_id": tokenizer.pad_token_id}
    factory, flag = AutoModelForSequenceClassification, "base_model_name"
    model = load(factory, flag, language_model_path, dtype=torch.float32, **settings).to(device)
    if model.config.is_encoder_decoder:
        raise UsageError(f"--task reward trains causal models and encoders here; {language_model_path} is neither")
    length = min(context_length(model.config), config.context_length)
    texts = tokenizer(column(train, config.prompt_column, "prompt_column"), add_special_tokens=False).input_ids
    generator = torch.Generator().manual_seed(config.seed)
    groups = length_grouped([len(text) for text in texts], config.reward_batch_size, generator)
    batches = (
        classifier_batch(
            [cut_short(texts[i], length, generator) for i in group],
            [labels[i] for i in group],
            tokenizer.pad_token_id,
            device,
        )
        for group in groups
    )
    fit(model, batches, config.reward_steps, config.reward_learning_rate, "reward model")
    whole, half = held_out_accuracies(config, model, tokenizer, held_out, length)
    with whole_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        write_whole(scratch / "run_config.json", to_json(config))
    print(f"reward model: held-out accuracy {whole:.1%} on whole texts, {half:.1%} on their first halves, in {folder}")
    return folder


def held_out_accuracies(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict], length: int
) -> tuple[float, float]:
    """Accuracy on whole texts, of which the model reads the last `length` tokens, and on their first halves."""
    labels = column(rows, config.label_column, "label_column", int)
    texts = tokenizer(column(rows, config.prompt_column, "prompt_column"), add_special_tokens=False).input_ids
    whole = [text[-length:] for text in texts]
    half = [text[: math.ceil(len(text) / 2)][-length:] for text in texts]
    whole_accuracy, half_accuracy = (accuracy(model, cut, labels, tokenizer.pad_token_id) for cut in (whole, half))
    return whole_accuracy, half_accuracy
