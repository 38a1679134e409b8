"""The `sft` stage: a language model trained on texts, or on completions of prompts; and the loop that trains it.

The model is the policy's start and its reference. Cross-entropy is over what it is to write: the completion with its
end, never the prompt.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adapters import adapter_to_add, base_of
from config import Config, RunError, UsageError, to_json
from dataset import column, load_rows, pad
from device import prepare_device
from files import whole_folder, write_whole
from folders import stage_folder, write_manifest
from hub import prepare_config
from loading import (
    count_parameters,
    load_base,
    load_tokenizer,
    loader_of,
    recompute_activations,
    thin_gradient,
    to_be_trained,
    write_model,
)
from probe import context_length
from progress import progress
from prompts import bare_ids, limit_length, make_prompts, text_ids
from provenance import Source, columns_read, write_record
from randomness import permutation

EOS = "<|endoftext|>"
PAD = "<|pad|>"
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


def rows_of(batch: dict, rows: list[int]) -> dict:
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
    return [rows_of(batch, list(range(n_rows))[start : start + most_rows]) for start in range(0, n_rows, most_rows)]


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


class Example(NamedTuple):
    """Ids of a text to learn to write, and of the prompt that stands before it and is not learned: [] for none."""

    prompt: list[int]
    completion: list[int]


def token_pieces(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Example]:
    """The texts as ids, each begun as a prompt of PPO is, ended by EOS, and cut into pieces of at most `length`.

    A long text's last piece reaches back to be of full length: a short rest would teach the model to end at once.
    """
    pieces = []
    for ids in text_ids(texts, tokenizer):
        whole = [*ids, tokenizer.eos_token_id]
        last_start = max(0, len(whole) - length)
        for start in range(0, len(whole), length):
            begin = min(start, last_start)
            pieces.append(whole[begin : begin + length])
    return [Example(prompt=[], completion=piece) for piece in pieces if len(piece) > 1]


def completions(rows: list[dict], config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The completion column, ended by EOS, behind the prompt that PPO will use, both cut to PPO's lengths."""
    prompts = make_prompts(rows, config, tokenizer)
    if not prompts:
        raise UsageError(f"--prompt_column {config.prompt_column!r} holds no text to answer")
    prompts = limit_length(prompts, config, tokenizer)
    texts = column([prompt.row for prompt in prompts], config.completion_column, "completion_column")
    answers = bare_ids(texts, tokenizer)
    examples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ended = [*answer, tokenizer.eos_token_id]
        examples.append(Example(prompt=prompt.ids, completion=ended[: config.max_new_tokens]))
    return examples


def check_room(examples: list[Example], model: PreTrainedModel) -> None:
    """Raise UsageError if the longest example does not fit the model's context."""
    if model.config.is_encoder_decoder:
        parts = [max(len(example.prompt), len(example.completion)) for example in examples]
        room = min(context_length(part, model.config) for part in (model.get_encoder(), model.get_decoder()))
    else:
        parts = [len(example.prompt) + len(example.completion) for example in examples]
        room = context_length(model)
    if max(parts) > room:
        raise UsageError(
            f"the longest prompt and completion have {max(parts)} tokens, and the model can read {room}: "
            "lower --max_prompt_length or --max_new_tokens"
        )


def language_examples(
    rows: list[dict], config: Config, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> list[Example]:
    """What a language model learns from the rows: completions where a column is named for them, else whole texts."""
    if config.completion_column:
        examples = completions(rows, config, tokenizer)
        check_room(examples, model)
        return examples
    if model.config.is_encoder_decoder:
        raise UsageError("an encoder-decoder learns to answer: name the --completion_column for --task sft")
    length = min(context_length(model), config.context_length)
    texts = column(rows, config.prompt_column, "prompt_column")
    examples = token_pieces(texts, tokenizer, length)
    if not examples:
        raise UsageError(f"--prompt_column {config.prompt_column!r} holds no text to train on")
    return examples


def language_batch(
    examples: list[Example], pad_id: int, is_encoder_decoder: bool, device: torch.device
) -> dict[str, torch.Tensor]:
    """Inputs and labels: every real token of the completions is predicted, and no other."""
    prompts = [example.prompt for example in examples]
    completions = [example.completion for example in examples]
    if is_encoder_decoder:
        ids, mask = pad(prompts, pad_id, "right")
        targets, learned = pad(completions, pad_id, "right")
    else:
        both = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        ids, mask = pad(both, pad_id, "right")
        starts = torch.tensor([len(prompt) for prompt in prompts])
        targets = ids
        learned = mask & (torch.arange(ids.shape[1]) >= starts[:, None])
    labels = torch.where(learned, targets, IGNORED)
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device), "labels": labels.to(device)}


def endless_batches(
    examples: list[Example], batch_size: int, seed: int, pad_id: int, is_encoder_decoder: bool, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of examples of like length."""
    lengths = [len(example.prompt) + len(example.completion) for example in examples]
    for group in length_grouped(lengths, batch_size, seed):
        yield language_batch([examples[i] for i in group], pad_id, is_encoder_decoder, device)


@torch.no_grad()
def perplexity(model: PreTrainedModel, examples: list[Example], pad_id: int, batch_size: int = 64) -> float:
    """exp of the mean negative log-likelihood a token, over all predicted tokens of the examples."""
    total = 0.0
    count = 0
    for start in range(0, len(examples), batch_size):
        some = examples[start : start + batch_size]
        batch = language_batch(some, pad_id, model.config.is_encoder_decoder, model.device)
        n_predicted = n_terms(model, batch)
        total += own_loss(model, batch).item() * n_predicted
        count += n_predicted
    return math.exp(total / count)


def new_tokenizer(texts: list[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on the texts: whatever a person types has tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        truncation_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def new_language_model(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A small GPT-2 with random weights, sized by the config's stage fields."""
    model_config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=config.context_length,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        activation_function="gelu_pytorch_tanh",
        initializer_range=0.02 * (768 / config.n_embd) ** 0.5,  # GPT-2's is for a width of 768
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(prepare_config(model_config))


def start_language_model(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """What is to be trained on texts: --base_model_name, all of it or an adapter on it, or a small GPT-2 of random
    weights, all of them.
    """
    device = prepare_device(config)
    if config.trains_from_scratch:
        model = new_language_model(config, tokenizer).to(device)
        thin_gradient(model)
    else:
        adapter = adapter_to_add(config, config.base_model_name)
        model = to_be_trained(load_base(config, config.base_model_name, device, adapter), config)
    recompute_activations(model, config)
    return model


def training_batches(
    model: PreTrainedModel, examples: list[Example], config: Config, pad_id: int
) -> tuple[Iterator[dict[str, torch.Tensor]], int]:
    """What a language model is trained on, batch by batch, and in how many steps."""
    batches = endless_batches(
        examples,
        batch_size=config.sft_batch_size,
        seed=config.seed,
        pad_id=pad_id,
        is_encoder_decoder=model.config.is_encoder_decoder,
        device=model.device,
    )
    return batches, n_steps(config.sft_steps, config.sft_epochs, len(examples), config.sft_batch_size)


def levers(config: Config) -> dict:
    """How `fit` and `try_out` go through a batch of texts."""
    passes_of = partial(in_passes, most_rows=config.mini_batch_size)
    return {"passes_of": passes_of, "mixed_precision": config.mixed_precision == "bf16"}


def train_language_model(
    config: Config, rows: list[dict], tokenizer: PreTrainedTokenizerBase, name: str
) -> PreTrainedModel:
    """A language model trained on rows: --base_model_name fine-tuned, or a small GPT-2 from scratch."""
    model = start_language_model(config, tokenizer)
    examples = language_examples(rows, config, tokenizer, model)
    batches, steps = training_batches(model, examples, config, tokenizer.pad_token_id)
    fit(model, batches, steps, config.sft_learning_rate, name, **levers(config))
    return model


def save_stage(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    source: Source,
    merge: bool = False,
    **figures: float,
) -> None:
    """The model or its adapter, which with `merge` is folded in, tokenizer, settings, and what it was made from with
    its figures on held-out rows: all or nothing.
    """
    with whole_folder(folder) as scratch:
        write_model(model, tokenizer, scratch, merge)
        weights = {name: getattr(config, name) for name in ("dtype", "load_in_8bit", "load_in_4bit")}
        base = base_of(str(scratch))
        facts = {} if base == str(scratch) else {"base_weights": weights}
        write_manifest(scratch, loader_of(model), base, **facts)
        write_whole(scratch / "run_config.json", to_json(config))
        write_record(scratch, source, **figures)


def run_sft(config: Config) -> Path:
    """The `sft` stage: train the language model, print its held-out perplexity, and save it whole.

    A dry run makes all of it but the steps, and leaves nothing.
    """
    folder = stage_folder(config, "sft")
    rows = load_rows(config, "train")
    held_out = load_rows(config, "validation", 1000)
    if config.trains_from_scratch:
        texts = column(rows, config.prompt_column, "prompt_column")
        tokenizer = new_tokenizer(texts, config.vocab_size, config.context_length)
    else:
        adapter = adapter_to_add(config, config.base_model_name)
        tokenizer = load_tokenizer(config.base_model_name, adapter=adapter)
    model = start_language_model(config, tokenizer)
    examples = language_examples(rows, config, tokenizer, model)
    held_out_examples = language_examples(held_out, config, tokenizer, model)
    batches, steps = training_batches(model, examples, config, tokenizer.pad_token_id)
    size = count_parameters(model)
    if config.dry_run:
        loss = try_out(model, batches, "language model", **levers(config))
        told = f"{size}, on {len(examples):,} examples in {steps:,} steps; the first loss is {loss:.3f}"
        print(f"dry run: {folder} would be a language model of {told}")
        return folder
    fit(model, batches, steps, config.sft_learning_rate, "language model", **levers(config))
    result = perplexity(model, held_out_examples, tokenizer.pad_token_id, config.mini_batch_size)
    source = Source(
        columns_read(config, rows[0], config.completion_column), rows, held_out, start=config.base_model_name
    )
    save_stage(folder, model, tokenizer, config, source, merge=config.merge, perplexity=result)
    print(f"language model: held-out perplexity {result:.2f} a token, {size}, in {folder}")
    return folder
