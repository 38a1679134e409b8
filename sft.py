"""The `sft` stage: a language model trained on texts, or on completions of prompts.

The model is the policy's start and its reference. Cross-entropy is over what it is to write: the completion with its
end, never the prompt.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adapters import adapter_to_add, base_of
from card import CARD, stage_card
from config import Config, UsageError, to_json
from conversations import end_of_answer, own_answer
from dataset import LOOKED_AT, check_column, column, in_file_order, load_rows, most_texts, pad
from device import prepare_device, products, settle_precision
from encoding import bare_ids, text_ids
from files import whole_folder, write_whole
from fitting import IGNORED, fit, length_grouped, levers, n_steps, n_terms, own_loss, try_out
from folders import stage_folder, write_manifest
from generate import end_ids
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
from prompts import limit_length, make_prompts
from provenance import Source, columns_read, write_record

EOS = "<|endoftext|>"
PAD = "<|pad|>"


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


def answers(rows: list[dict], config: Config) -> list[str]:
    """What is learned behind the rows' prompts: the completion column, or else the answer in a column of messages."""
    if config.completion_column:
        return column(rows, config.completion_column, "completion_column")
    return [own_answer(row, config) for row in rows]


def check_answers_to_learn(rows: Sequence[dict], config: Config) -> None:
    """Raise UsageError for a row without an answer; of very many messages only the first ones are looked at."""
    if config.completion_column:
        check_column(rows, config.completion_column, "completion_column")
    else:
        answers(in_file_order(rows[:LOOKED_AT]), config)


def completions(rows: list[dict], config: Config, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> list[Example]:
    """The rows' `answers` behind the prompt that PPO will use, both cut to PPO's lengths; each ended by what ends it in
    the template of chat if that is one of the `ends` of a response, else by EOS.
    """
    prompts = make_prompts(rows, config, tokenizer)
    if not prompts:
        raise UsageError(f"--prompt_column {config.prompt_column!r} holds no text to answer")
    prompts = limit_length(prompts, config, tokenizer)
    end = end_of_answer(tokenizer, ends) if config.chat else tokenizer.eos_token_id
    texts = answers([prompt.row for prompt in prompts], config)
    examples = []
    for prompt, ids in zip(prompts, bare_ids(texts, tokenizer), strict=True):
        examples.append(Example(prompt=prompt.ids, completion=[*ids, end][: config.max_new_tokens]))
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
    """What a language model learns from the rows: answers, where a column is named for them or the prompts are
    conversations, else whole texts.
    """
    if config.completion_column or config.chat:
        examples = completions(rows, config, tokenizer, end_ids(model, tokenizer))
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
    work = products(config.sft_batch_size * config.context_length)
    settle_precision(model, work, config)
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
    stage: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    source: Source,
    merge: bool = False,
    **figures: float,
) -> None:
    """The model or its adapter, which with `merge` is folded in, tokenizer, settings, what it was made from with its
    figures on held-out rows, and the card of a model of that stage: all or nothing.
    """
    with whole_folder(folder) as scratch:
        write_model(model, tokenizer, scratch, merge)
        weights = {name: getattr(config, name) for name in ("dtype", "load_in_8bit", "load_in_4bit")}
        base = base_of(str(scratch))
        facts = {} if base == str(scratch) else {"base_weights": weights}
        write_manifest(scratch, loader_of(model), base, **facts)
        write_whole(scratch / "run_config.json", to_json(config))
        write_record(scratch, source, **figures)
        write_whole(scratch / CARD, stage_card(scratch, config, stage))


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
    save_stage(folder, "sft", model, tokenizer, config, source, merge=config.merge, perplexity=result)
    print(f"language model: held-out perplexity {result:.2f} a token, {size}, in {folder}")
    return folder
