"""What is checked and said before a run: data and settings, memory, the model's context, the start-up invariants."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import NamedTuple

import torch
from torch.nn.functional import pad

import ppo
from adapters import adapter_to_add
from classifier import check_labels
from config import Config, RunError, UsageError
from conversations import without_whole_pairs
from dataset import load_rows
from dataset import pad as pad_rows
from device import prepare_device
from folders import stage_folder
from generate import respond, sample, score_responses
from hub import one_sentence
from loading import check_encoder, check_packages, count_parameters, load_base, load_tokenizer
from model import PolicyModel
from probe import context_length
from prompts import Prompt, check_prompts, fitting_rows, load_all_prompts, longest_prompt, make_room, most_prompts
from randomness import uniforms
from reward import check_weights, load_reward_function
from sft import check_answers_to_learn
from train import Fixed, Rollout


class Gap(NamedTuple):
    """How far apart two log-probabilities of the same tokens are, in nats; NaN where one of them is."""

    mean: float
    most: float


TOLERANCES = {  # behind them, what sampling and scoring differed by with a Llama of 135 million parameters
    "float32": Gap(mean=1e-3, most=1e-3),  # 5e-6, 2e-5
    "float16": Gap(mean=0.02, most=0.2),  # 0.005, 0.04
    "bfloat16": Gap(mean=0.1, most=1.0),  # 0.036, 0.3; the larger the batch, the further off is its worst token
    "8 bits": Gap(mean=0.1, most=3.0),  # 0.038, 1.3 where activations are of 8 bits, too
}
MOST_ENDS = 2  # special tokens that a tokenizer puts around a prompt
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a number


def check_before_training(config: Config, trains_reward: bool) -> None:
    """Refuse, before minutes of training, what would be refused after them: data, columns, weights, lengths."""
    check_weights(config)
    check_packages(config)
    if config.reward_fn:
        load_reward_function(config.reward_fn)
    reads_all = config.dataset_path or trains_reward
    rows = load_rows(config, "train", None if reads_all else 1)
    held_out = load_rows(config, "validation", 2000 if reads_all else 1)
    for some_rows in (rows, held_out):
        asked = some_rows if config.task != "reward" else without_whole_pairs(some_rows, config)
        if asked:
            check_prompts(asked, config)
        if (config.completion_column or config.chat) and (config.task == "sft" or config.sft_first):
            check_answers_to_learn(some_rows, config)
    comes_later = config.task == "train" and (
        trains_reward or (config.sft_first and not stage_folder(config, "sft").exists())
    )
    if comes_later and not config.trains_from_scratch:
        check_start(config)
    if config.task == "train":
        for part in ("train", "validation", "test") if config.eval_every else ("train", "validation"):
            fitting_rows(config, part, limit=1)
    if trains_reward:
        try:
            check_labels(rows, held_out, config)
        except UsageError as error:
            hint = "; or name what rewards, --reward_fn or --reward_model_path" if config.task == "train" else ""
            raise UsageError(f"{error}{hint}") from None
    if config.task == "train" and config.trains_from_scratch:
        check_own_model(config)


def check_start(config: Config) -> None:
    """Raise UsageError if PPO could not start from the base model, whatever the stages before it make of it."""
    adapter = adapter_to_add(config, config.base_model_name)
    model = load_base(config, config.base_model_name, prepare_device(config), adapter)
    check_encoder(config.critic, model.config, config.base_model_name)
    tokenizer = load_tokenizer(config.base_model_name, adapter=adapter)
    with redirect_stdout(io.StringIO()):  # what is cut will be told when it is
        prompts = load_all_prompts(config, tokenizer, most_prompts(config))
    check_context(config, PolicyModel(model), *prompts)


def check_own_model(config: Config) -> None:
    """Raise UsageError for what a model that is yet to be trained here, a small GPT-2, will not have."""
    if config.critic == "encoder":
        raise UsageError("--critic encoder is for encoder-decoders; the model made here is none: separate or shared")
    if config.chat:
        raise UsageError(
            "the prompts are conversations, and the tokenizer made here has no template for them; "
            "expected a --base_model_name of chat, or prompts of text"
        )
    check_lengths(config)


def check_lengths(config: Config) -> None:
    """Raise UsageError if prompt and response may not fit the context of a model that is yet to be trained."""
    if config.max_prompt_length + config.max_new_tokens > config.context_length:
        raise UsageError(
            f"--max_prompt_length {config.max_prompt_length} plus --max_new_tokens {config.max_new_tokens} "
            f"is more than the {config.context_length} tokens of --context_length"
        )


def check_context(config: Config, policy: PolicyModel, *prompts: Sequence[Prompt]) -> None:
    """Raise UsageError if the longest prompt and a response, together or in encoder and decoder, may not fit the
    model's context. Prompts that are yet to be made will be cut to it.
    """
    prompt = max(map(longest_prompt, prompts))
    room = prompt_room(config, policy)
    if prompt > room:
        raise UsageError(
            f"the longest prompt has {prompt} tokens, and with --max_new_tokens {config.max_new_tokens} the model can "
            f"read {room} at most: let prompts be cut with --max_prompt_length {room}, or lower --max_new_tokens"
        )
    for some in prompts:
        make_room(some, room)


def prompt_room(config: Config, policy: PolicyModel) -> int:
    """The longest prompt in tokens that leaves the model room for a response. Raises UsageError if there is none."""
    response = config.max_new_tokens
    if policy.is_encoder_decoder:
        whole = policy.language_model
        room = context_length(whole.get_encoder(), whole.config)
        context = context_length(whole.get_decoder(), whole.config)
        most = context
    else:
        context = context_length(policy.language_model)
        room = context - response
        most = context - 1
    if response > most:
        raise UsageError(f"--max_new_tokens {response} is more than the {most} tokens that the model has room for")
    return room


@torch.no_grad()
def check_static_cache(config: Config, policy: PolicyModel) -> None:
    """Raise UsageError for a model that cannot be sampled with --static_cache, or draws from another distribution than
    it has, seen on a few tokens of two prompts of unlike lengths.
    """
    if not config.static_cache:
        return
    language_model = policy.language_model
    problem = f"--static_cache cannot be used with {language_model.name_or_path} ({language_model.config.model_type})"
    prompts = pad_rows([[1, 2, 3], [1]], 0, "right" if policy.is_encoder_decoder else "left")
    query_ids, query_mask = (tensor.to(policy.device) for tensor in prompts)
    numbers = torch.full((2, 4), 0.5, device=policy.device)
    with one_sentence(problem):
        drawn = sample(policy, query_ids, query_mask, numbers, eos_ids=[-1], pad_id=0, static_cache=True)
    scored = policy.score(query_ids, query_mask, drawn.response_ids, drawn.mask)
    gap = gap_between(drawn.logprobs, scored.logprobs, drawn.mask)
    if not is_close(gap, tolerance(config)):
        raise UsageError(f"{problem}: with it a token's log-probability is {gap.most:.2g} nats off")


def memory_estimate(config: Config, policy: PolicyModel) -> str:
    """Bytes that the update needs, roughly: weights, reference, gradients and Adam's two moments, activations, logits.

    Of (rows, response, vocab) tensors in float32 there are two, and two more for an entropy bonus. Activations are
    taken as 18 numbers a token, layer and unit of width; with activation checkpointing as two a layer, and the 18 of
    the layer that is recomputed, when the logits are gone.
    """
    model_config = policy.language_model.config.get_text_config()
    weights = sum(n_bytes(p) for p in policy.parameters())
    trained = sum(n_bytes(p) for p in policy.parameters() if p.requires_grad)
    static = weights + 4 * trained  # of what trains there are a reference, a gradient and two moments, too

    n_logits = 2 + 2 * (config.entropy_coef > 0)
    rows = min(config.mini_batch_size, config.batch_size)
    logits = n_logits * BYTES["float32"] * rows * config.max_new_tokens * model_config.vocab_size
    longest = config.prompt_tokens + MOST_ENDS if config.prompt_tokens else config.max_prompt_length
    prompt = min(longest, config.max_prompt_length, prompt_room(config, policy))
    tokens = rows * (prompt + config.max_new_tokens)
    number_a_layer = BYTES[config.dtype] * tokens * model_config.hidden_size  # bytes of one number a unit of width
    if config.gradient_checkpointing:
        inputs = 2 * number_a_layer * model_config.num_hidden_layers
        forward = inputs + max(logits, 18 * number_a_layer)
    else:
        forward = 18 * number_a_layer * model_config.num_hidden_layers + logits
    return (
        f"memory, estimated: {gigabytes(static)} for {count_parameters(policy)} with reference, gradients and Adam, "
        f"{gigabytes(forward)} for a forward pass of {rows} rows of {prompt} + "
        f"{config.max_new_tokens} tokens, the longest there may be (less with a smaller --mini_batch_size or "
        f"{'--prompt_tokens' if config.prompt_tokens else '--max_prompt_length'}, or with --gradient_checkpointing)"
    )


def n_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def gigabytes(n: float) -> str:
    return f"{n / 1e9:.2f} GB"


@torch.no_grad()
def check_invariants(policy: PolicyModel, fixed: Fixed, prompts: list[Prompt], config: Config) -> Gap:
    """What must hold before the first update, on responses to a minibatch of the run's own prompts.

    Sampling and scoring agree on every log-probability; scoring in eval mode and in passes by length, as a rollout is
    scored, agrees with scoring in train mode at once, as an update does it (the ratio is 1, whatever a configuration
    calls its dropout); more padding changes nothing; the policy is its reference (the KL is 0), but for one of 8 bits,
    whose difference is told; no dropout is on. Raises RunError with the likely cause where one of them does not. The
    policy is left in train mode. Returns by how much sampling and scoring differ.
    """
    prompts = prompts[: config.mini_batch_size]
    random_numbers = uniforms(config.seed, "sampling", 0, (len(prompts), config.max_new_tokens))
    drawn = respond(policy, fixed.tokenizer, [prompt.ids for prompt in prompts], random_numbers, config)
    rows = {
        "query_ids": drawn.query_ids,
        "query_mask": drawn.query_mask,
        "response_ids": drawn.response_ids,
        "response_mask": drawn.mask,
        "temperature": config.temperature,
    }
    policy.train()
    check_dropout(policy)
    side = (0, 3) if policy.is_encoder_decoder else (3, 0)
    more_padding = {
        "query_ids": pad(drawn.query_ids, side, value=fixed.tokenizer.pad_token_id),
        "query_mask": pad(drawn.query_mask, side, value=False),
    }
    return compare_logprobs(
        config,
        mask=drawn.mask,
        sampled=drawn.logprobs,
        scored=score_responses(policy, drawn, config).logprobs,
        scored_again=policy(**rows).logprobs,
        padded=policy(**rows | more_padding).logprobs,
        reference=score_responses(fixed.reference, drawn, config).logprobs,
    )


@torch.no_grad()
def gap_of_policies(one: PolicyModel, other: PolicyModel, fixed: Fixed, prompts: list[Prompt], config: Config) -> Gap:
    """Between what two policies give a token, on responses of the second."""
    random_numbers = uniforms(config.seed, "evaluation", 0, (len(prompts), config.max_new_tokens))
    drawn = respond(other, fixed.tokenizer, [prompt.ids for prompt in prompts], random_numbers, config)
    first, second = (score_responses(policy, drawn, config).logprobs for policy in (one, other))
    return gap_between(first, second, drawn.mask)


def gap_between(one: torch.Tensor, other: torch.Tensor, mask: torch.Tensor) -> Gap:
    gaps = (one - other).abs()[mask]
    return Gap(mean=gaps.mean().item(), most=gaps.max().item())


def is_close(gap: Gap, tolerance: Gap) -> bool:
    """Whether neither is exceeded; not of NaN. The mean is what gives a fault away among coarse numbers."""
    return gap.mean <= tolerance.mean and gap.most <= tolerance.most


def tolerance(config: Config) -> Gap:
    """How far apart two ways to one log-probability may be. With weights of 8 bits, a GPU rounds activations to 8, too,
    so that the smallest of differences can grow.
    """
    if config.load_in_8bit:
        return TOLERANCES["8 bits"]
    return TOLERANCES["bfloat16" if config.mixed_precision == "bf16" or config.load_in_4bit else config.dtype]


def check_dropout(policy: PolicyModel) -> None:
    """Raise RunError where a module drops what it is given at random."""
    for name, module in policy.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.training and module.p > 0:
            raise RunError(f"dropout is on in {name}: the same tokens would score differently every time")


def compare_logprobs(
    config: Config,
    mask: torch.Tensor,
    sampled: torch.Tensor,
    scored: torch.Tensor,
    scored_again: torch.Tensor,
    padded: torch.Tensor,
    reference: torch.Tensor,
) -> Gap:
    """Five log-probabilities of the same tokens, (batch, time), that must be one; RunError says which are not.

    Returns by how much the first two differ.
    """
    allowed = tolerance(config)
    drawn = gap_between(sampled, scored, mask)
    if not is_close(drawn, allowed):
        raise RunError(
            f"sampling and scoring disagree by {drawn.mean:.2g} nats a token and {drawn.most:.2g} at most, expected "
            f"{allowed.mean:g} and {allowed.most:g}: likely causes are positions that count padding, a logits "
            "processor that only one of them applies, or a wrong shift"
        )
    if not is_close(gap_between(scored_again, scored, mask), allowed):
        ratio = ppo.importance_ratio(logprobs=scored_again, old_logprobs=scored, mask=mask)
        raise RunError(f"the importance ratio is {ratio.max().item():.4f} before any update, not 1: scoring is random")
    gap = gap_between(scored_again, padded, mask)
    if not is_close(gap, allowed):
        raise RunError(
            f"three more columns of padding beside the prompts move a token's log-probability by {gap.most:.2g} nats: "
            "this family of models does not leave padding out, so that a row would depend on those beside it"
        )
    gap = gap_between(scored, reference, mask)
    if config.reference_in_8bit:
        told = f"{gap.mean:.2g} nats a token and {gap.most:.2g} at most"
        print(f"policy and 8-bit reference differ by {told} before any update")
    elif not is_close(gap, allowed):
        raise RunError(
            f"policy and reference differ by {gap.most:.2g} nats on a token before any update: other weights"
        )
    return drawn


def show_samples(rollout: Rollout, count: int = 3) -> None:
    """Print a few responses of a rollout with their rewards."""
    for i in range(min(count, len(rollout.texts))):
        terms = ", ".join(f"{name} {values[i].item():.3f}" for name, values in rollout.term_scores.items())
        print(f"prompt {rollout.prompts[i].text!r}\n  response {rollout.texts[i]!r}\n  {terms}")
