"""The `sft` stage: a language model trained on texts, or on completions of prompts; and the loop that trains it.

The model is the policy's start and its reference. Cross-entropy is over what it is to write: the completion with its
end, never the prompt.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from config import Config, RunError, UsageError, to_json
from dataset import column, load_rows, most_texts, pad
from device import prepare_device
from files import whole_folder, write_whole
from folders import stage_folder
from loading import check_is_whole, load_language_model, load_tokenizer, prepare_config, thin_gradient
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


def fit(
    model: PreTrainedModel,
    batches: Iterator[dict],
    steps: int,
    learning_rate: float,
    name: str,
    loss_of: Callable = own_loss,
) -> float:
    """Minimise a loss by AdamW: a tenth of warm-up, then linearly to 0. Returns the recent mean loss."""
    warm_up = math.ceil(steps / 10)

    def share_of_peak(step: int) -> float:
        rising = (step + 1) / warm_up
        falling = (steps - step) / max(1, steps - warm_up)
        return min(rising, falling)

    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
    model.train()
    recent = 0.0
    with progress(steps, name, "step") as advance:
        for step in range(steps):
            loss = loss_of(model, next(batches))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            recent = loss.item() if step == 0 else 0.95 * recent + 0.05 * loss.item()
            if not math.isfinite(recent):
                raise RunError(f"the loss of the {name} is {recent} at step {step}; try a lower learning rate")
            advance({"loss": f"{recent:.3f}"})
    model.eval()
    return recent


def try_out(model: PreTrainedModel, batches: Iterator[dict], name: str, loss_of: Callable = own_loss) -> float:
    """The loss of the first batch, with its gradient: what `fit` begins with, but for the step itself.

    Raises RunError where it is no number.
    """
    loss = loss_of(model.train(), next(batches))
    loss.backward()
    if not math.isfinite(loss.item()):
        raise RunError(f"the loss of the {name} is {loss.item()} before any step")
    return loss.item()


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
def perplexity(model: PreTrainedModel, examples: list[Example], pad_id: int) -> float:
    """exp of the mean negative log-likelihood a token, over all predicted tokens of the examples."""
    is_encoder_decoder = model.config.is_encoder_decoder
    first = 0 if is_encoder_decoder else 1  # nothing predicts a causal model's first token
    total = 0.0
    count = 0
    for start in range(0, len(examples), 64):
        batch = language_batch(examples[start : start + 64], pad_id, is_encoder_decoder, model.device)
        n_predicted = (batch["labels"][:, first:] != IGNORED).sum().item()
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
    """What is to be trained on texts: --base_model_name, or a small GPT-2 of random weights."""
    device = prepare_device(config)
    if config.trains_from_scratch:
        model = new_language_model(config, tokenizer).to(device)
    else:
        check_is_whole(config.base_model_name, "base_model_name")
        model = load_language_model(config.base_model_name, "float32", device, allow_pickle=config.allow_pickle)
    thin_gradient(model)
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


def train_language_model(
    config: Config, rows: list[dict], tokenizer: PreTrainedTokenizerBase, name: str
) -> PreTrainedModel:
    """A language model trained on rows: --base_model_name fine-tuned, or a small GPT-2 from scratch."""
    model = start_language_model(config, tokenizer)
    examples = language_examples(rows, config, tokenizer, model)
    batches, steps = training_batches(model, examples, config, tokenizer.pad_token_id)
    fit(model, batches, steps, config.sft_learning_rate, name)
    return model


def save_stage(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    source: Source,
    **figures: float,
) -> None:
    """Model, tokenizer, settings, and what it was made from with its figures on held-out rows: all or nothing."""
    with whole_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        write_whole(scratch / "run_config.json", to_json(config))
        write_record(scratch, source, **figures)


def run_sft(config: Config) -> Path:
    """The `sft` stage: train the language model, print its held-out perplexity, and save it whole.

    A dry run makes all of it but the steps, and leaves nothing.
    """
    folder = stage_folder(config, "sft")
    rows = load_rows(config, "train", most_texts(config, "sft"))
    held_out = list(load_rows(config, "validation", 1000))
    if config.trains_from_scratch:
        texts = column(rows, config.prompt_column, "prompt_column")
        tokenizer = new_tokenizer(texts, config.vocab_size, config.context_length)
    else:
        tokenizer = load_tokenizer(config.base_model_name)
    model = start_language_model(config, tokenizer)
    examples = language_examples(rows, config, tokenizer, model)
    held_out_examples = language_examples(held_out, config, tokenizer, model)
    batches, steps = training_batches(model, examples, config, tokenizer.pad_token_id)
    size = f"{model.num_parameters():,} parameters"
    if config.dry_run:
        loss = try_out(model, batches, "language model")
        told = f"{size}, on {len(examples):,} examples in {steps:,} steps; the first loss is {loss:.3f}"
        print(f"dry run: {folder} would be a language model of {told}")
        return folder
    fit(model, batches, steps, config.sft_learning_rate, "language model")
    result = perplexity(model, held_out_examples, tokenizer.pad_token_id)
    source = Source(
        columns_read(config, rows[0], config.completion_column), rows, held_out, start=config.base_model_name
    )
    save_stage(folder, model, tokenizer, config, source, perplexity=result)
    print(f"language model: held-out perplexity {result:.2f} a token, {size}, in {folder}")
    return folder
