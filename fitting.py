"""The loop that trains a stage before PPO: batches of texts of like length, AdamW, gradients in several passes."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from transformers import PreTrainedModel

from config import Config, RunError
from progress import progress
from randomness import permutation

IGNORED = -100  # the label that cross-entropy leaves out


def own_loss(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    """Cross-entropy over the labels of the batch, as the model computes it: the mean over those not IGNORED."""
    return model(**batch).loss


def n_terms(model: PreTrainedModel, batch: dict) -> int:
    """Over how many the loss of a batch is a mean: tokens that are predicted, else rows, be they texts or pairs'."""
    labels = batch["labels"]
    if labels.dim() == 1:
        return len(labels)
    first = 0 if model.config.is_encoder_decoder else 1  # nothing predicts a causal model's first token
    return int((labels[:, first:] != IGNORED).sum())


def part_of(batch: dict, rows: list[int]) -> dict:
    """Some rows of a batch, without the columns that are padding in all of them."""
    part = {name: tensor[rows] for name, tensor in batch.items()}
    width = int(part["attention_mask"].sum(1).max())
    part |= {name: part[name][:, :width] for name in ("input_ids", "attention_mask")}
    if part["labels"].dim() > 1:  # the last token of a text is always learned
        n_labels = int((part["labels"] != IGNORED).any(0).nonzero().max()) + 1
        part["labels"] = part["labels"][:, :n_labels]
    return {name: tensor.contiguous() for name, tensor in part.items()}


def in_passes(batch: dict, most_rows: int) -> list[dict]:
    """The batch as those of the forward passes that share its optimizer step, of at most so many rows."""
    n_rows = len(batch["labels"])
    if n_rows <= most_rows:
        return [batch]
    return [part_of(batch, list(range(n_rows))[start : start + most_rows]) for start in range(0, n_rows, most_rows)]


def add_gradient(
    model: PreTrainedModel, batch: dict, loss_of: Callable, passes_of: Callable, mixed_precision: bool
) -> float:
    """Add the gradient of a batch's loss to the parameters', a pass at a time; the loss.

    Each pass counts by its share of what the mean is over, so that the passes add up to the whole: a mean of means
    would weigh the tokens of short texts more.
    """
    passes = passes_of(batch)
    n_whole = n_terms(model, batch) if len(passes) > 1 else 0
    total = 0.0
    for part in passes:
        share = n_terms(model, part) / n_whole if n_whole else 1.0
        if share == 0:  # of no term there is no mean
            continue
        with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed_precision):
            loss = loss_of(model, part) * share
        loss.backward()
        total += loss.item()
    return total


def whole(batch: dict) -> list[dict]:
    return [batch]


def fit(
    model: PreTrainedModel,
    batches: Iterator[dict],
    steps: int,
    learning_rate: float,
    name: str,
    loss_of: Callable = own_loss,
    passes_of: Callable = whole,
    mixed_precision: bool = False,
) -> float:
    """Minimise a loss by AdamW: a tenth of warm-up, then linearly to 0. Returns the recent mean loss.

    Each of the batches is an optimizer step, in the forward passes that `passes_of` makes of it.
    """
    warm_up = math.ceil(steps / 10)

    def share_of_peak(step: int) -> float:
        rising = (step + 1) / warm_up
        falling = (steps - step) / max(1, steps - warm_up)
        return min(rising, falling)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
    model.train()
    recent, n_tokens, started = 0.0, 0, time.perf_counter()
    with progress(steps, name, "step") as advance:
        for step in range(steps):
            batch = next(batches)
            optimizer.zero_grad()
            loss = add_gradient(model, batch, loss_of, passes_of, mixed_precision)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            recent = loss if step == 0 else 0.95 * recent + 0.05 * loss
            if not math.isfinite(recent):
                raise RunError(f"the loss of the {name} is {recent} at step {step}; try a lower learning rate")
            n_tokens += int(batch["attention_mask"].sum())
            rate = n_tokens / (time.perf_counter() - started)
            advance({"loss": f"{recent:.3f}", "tokens/s": f"{rate:,.0f}"})
    model.eval()
    return recent


def try_out(
    model: PreTrainedModel,
    batches: Iterator[dict],
    name: str,
    loss_of: Callable = own_loss,
    passes_of: Callable = whole,
    mixed_precision: bool = False,
) -> float:
    """The loss of the first batch, with its gradient: what `fit` begins with, but for the step itself.

    Raises RunError where it is no number.
    """
    loss = add_gradient(model.train(), next(batches), loss_of, passes_of, mixed_precision)
    if not math.isfinite(loss):
        raise RunError(f"the loss of the {name} is {loss} before any step")
    return loss


def length_grouped(lengths: list[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices of texts of like length, in random order: little padding, every text once a pass.

    A pass shuffles the texts, sorts them by length within pools of 32 batches, and shuffles the batches.
    """
    pool_size = 32 * batch_size
    for number in itertools.count():
        order = permutation(seed, "texts", number, len(lengths)).tolist()
        ordered = []
        for start in range(0, len(order), pool_size):
            pool = order[start : start + pool_size]
            ordered += sorted(pool, key=lambda i: lengths[i])
        batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
        for i in permutation(seed, "texts", number, len(batches), part=1).tolist():
            yield batches[i]


def n_steps(steps: int, epochs: float, n_texts: int, batch_size: int) -> int:
    """As many optimizer steps as so many epochs take, or `steps` where epochs is 0."""
    if epochs:
        return math.ceil(epochs * n_texts / batch_size)
    return steps


def levers(config: Config) -> dict:
    """How `fit` and `try_out` go through a batch of texts."""
    passes_of = partial(in_passes, most_rows=config.mini_batch_size)
    return {"passes_of": passes_of, "mixed_precision": config.mixed_precision == "bf16"}
