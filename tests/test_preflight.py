"""What is checked and said before a run: its memory, its context, and the invariants that it checks on its own data."""

import copy
import itertools
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from micro import micro_config
from tiny_models import VOCAB, letter_tokenizer, tiny_gpt2, tiny_llama, tiny_policy, tiny_t5
from transformers import BartConfig, BartForConditionalGeneration

import generate
import preflight
from config import Config, RunError, UsageError
from folders import notice
from model import PolicyModel, frozen_copy
from preflight import check_context, check_invariants, compare_logprobs, memory_estimate
from prompts import Prompt
from sft import new_language_model
from train import Fixed, Minibatch, minibatch_loss, new_state, train

pytest_plugins = ["micro"]

# ----------------------------------------------------------------------------------------------------------------
# Memory and context
# ----------------------------------------------------------------------------------------------------------------


def estimate(monkeypatch, tokenizer, **settings) -> tuple[int, int]:
    """Bytes of weights and their like, and of a forward pass, as the estimate prints them."""
    monkeypatch.setattr(preflight, "gigabytes", lambda n_bytes: f"<{n_bytes:.0f}>")
    config = micro_config(**settings)
    language_model = new_language_model(config, tokenizer).to(getattr(torch, config.dtype))
    text = memory_estimate(config, PolicyModel(language_model))
    static, forward = map(int, re.findall(r"<(\d+)>", text))
    return static, forward


def peak_bytes(action: Callable) -> int:
    """The most memory that the action had at once, of what torch allocated for it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


SIZES = {
    "most of it logits": {"n_embd": 64, "n_layer": 2, "vocab": 4000, "rows": 8},
    "most of it activations": {"n_embd": 128, "n_layer": 4, "vocab": 300, "rows": 16},
    "logits, divided by a temperature": {"n_embd": 64, "n_layer": 2, "vocab": 4000, "rows": 8, "temperature": 0.8},
    "logits, entropy bonus": {"n_embd": 64, "n_layer": 2, "vocab": 4000, "rows": 8, "entropy_coef": 0.01},
    "logits, both": {"n_embd": 64, "n_layer": 2, "vocab": 4000, "rows": 8, "temperature": 0.8, "entropy_coef": 0.01},
    "logits, checkpointing": {"n_embd": 64, "n_layer": 2, "vocab": 4000, "rows": 8, "checkpointing": True},
    "activations, checkpointing": {"n_embd": 128, "n_layer": 4, "vocab": 300, "rows": 16, "checkpointing": True},
}


@pytest.mark.parametrize("size", SIZES)
def test_the_memory_estimate_is_what_a_step_takes(size, monkeypatch):
    """Weights, reference, gradients and moments to a per cent; the peak of a forward and backward pass to a fifth."""
    monkeypatch.setattr(preflight, "gigabytes", lambda n_bytes: f"<{n_bytes:.0f}>")
    settings = SIZES[size]
    vocab, rows, checkpointing = settings["vocab"], settings["rows"], "checkpointing" in settings
    config = Config(
        batch_size=rows,
        mini_batch_size=rows,
        max_prompt_length=12,
        max_new_tokens=48,
        gradient_checkpointing=checkpointing,
        temperature=settings.get("temperature", 1.0),
        entropy_coef=settings.get("entropy_coef", 0.0),
    )
    policy = PolicyModel(tiny_gpt2(vocab_size=vocab, n_embd=settings["n_embd"], n_layer=settings["n_layer"])).train()
    if checkpointing:
        policy.language_model.activation_checkpointing_enable({"use_reentrant": False})
    static, forward = map(int, re.findall(r"<(\d+)>", memory_estimate(config, policy)))

    query_ids = torch.randint(vocab, (rows, 12))
    response_ids = torch.randint(vocab, (rows, 48))
    ones = torch.ones(rows, 48)
    minibatch = Minibatch(
        query_ids=query_ids,
        query_mask=query_ids >= 0,
        response_ids=response_ids,
        mask=response_ids >= 0,
        old_logprobs=-ones,
        old_values=ones,
        advantages=ones,
        returns=ones,
    )

    def compute_gradient() -> None:
        loss, _ = minibatch_loss(policy, minibatch, rows * 48, config)
        loss.backward()

    compute_gradient()  # from now on, the gradients themselves are there
    assert peak_bytes(compute_gradient) == pytest.approx(forward, rel=0.2)

    optimizer = new_state(policy, config).optimizer
    optimizer.step()
    moments = [moment for own in optimizer.state.values() for moment in own.values() if moment.dim()]
    parameters = list(policy.parameters())
    reference = list(frozen_copy(policy).language_model.parameters())
    held = [*parameters, *reference, *(parameter.grad for parameter in parameters), *moments]
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == pytest.approx(static, rel=0.01)


@pytest.mark.parametrize(
    ("change", "static", "forward"),
    [
        ({"mini_batch_size": 4}, "same", "more"),
        ({"max_new_tokens": 24}, "same", "more"),
        ({"max_prompt_length": 24, "prompt_tokens": 0}, "same", "more"),
        ({"max_prompt_length": 24}, "same", "same"),  # the first words are no more for that
        ({"prompt_tokens": 12, "max_prompt_length": 24}, "same", "more"),
        ({"gradient_checkpointing": True}, "same", "less"),
        ({"n_layer": 2}, "more", "more"),
        ({"n_embd": 32}, "more", "more"),
        ({"dtype": "bfloat16", "task": "generate"}, "less", "less"),
        ({"ppo_epochs": 9}, "same", "same"),
    ],
)
def test_the_memory_estimate_moves_with_the_settings(change, static, forward, monkeypatch, tokenizer):
    before, after = estimate(monkeypatch, tokenizer), estimate(monkeypatch, tokenizer, **change)
    words = ["more" if b > a else "less" if b < a else "same" for a, b in zip(before, after, strict=True)]
    assert words == [static, forward]


def test_gigabytes_are_thousands_of_millions():
    assert preflight.gigabytes(1_234_567_890) == "1.23 GB"


def test_the_notice_is_for_models_trained_from_scratch():
    text = notice(micro_config())
    for words in ("teaching demonstration", "8,897 parameters", "generated movie reviews", "--preset gpt2-imdb"):
        assert words in text
    assert "on owner/reviews." in notice(micro_config(dataset_path="owner/reviews"))
    assert f"on {Path(__file__).name}." in notice(micro_config(dataset_path=__file__))
    assert notice(micro_config(base_model_name="gpt2")) == ""


@pytest.mark.parametrize(("prompt", "response", "fits"), [(40, 24, True), (41, 24, False), (40, 25, False)])
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_prompt_and_response_together_must_fit_the_context(build, prompt, response, fits):
    """64 positions; the message names the longest prompt beside such a response. What counts is the longest prompt
    there is, not the longest that might be."""
    config = Config(max_prompt_length=512, max_new_tokens=response)
    policy = PolicyModel(build())
    prompts = [Prompt("", [2], {}), Prompt("", [2] * prompt, {})]
    if fits:
        return check_context(config, policy, prompts)
    words = f"the longest prompt has {prompt} tokens, and with --max_new_tokens {response} the model can read "
    with pytest.raises(
        UsageError, match=f"{words}{64 - response} at most: .* --max_prompt_length {64 - response}, or "
    ):
        check_context(config, policy, prompts)


def test_a_response_that_leaves_no_room_for_a_prompt_is_refused():
    check_context(Config(max_new_tokens=63), PolicyModel(tiny_gpt2()), [Prompt("", [2], {})])
    with pytest.raises(UsageError, match="--max_new_tokens 64 is more than the 63 tokens that the model has room for"):
        check_context(Config(max_new_tokens=64), PolicyModel(tiny_gpt2()), [Prompt("", [2], {})])


def test_an_encoder_decoder_with_relative_positions_has_no_limit():
    check_context(Config(max_new_tokens=5000), PolicyModel(tiny_t5()), [Prompt("", [2] * 5000, {})])


@pytest.mark.parametrize(("prompt", "response", "fits"), [(64, 64, True), (65, 8, False), (8, 65, False)])
def test_an_encoder_decoder_with_counted_positions_must_fit_prompt_and_response_each(prompt, response, fits):
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    policy = PolicyModel(BartForConditionalGeneration(BartConfig(vocab_size=VOCAB, **size, **heads)))
    config = Config(max_new_tokens=response)
    prompts = [Prompt("", [5] * prompt, {})]
    if fits:
        return check_context(config, policy, prompts)
    words = "--max_new_tokens 65 is more than the 64" if response == 65 else "the longest prompt has 65 .* read 64 at"
    with pytest.raises(UsageError, match=words):
        check_context(config, policy, prompts)


# ----------------------------------------------------------------------------------------------------------------
# Invariants
# ----------------------------------------------------------------------------------------------------------------

PROMPTS = [Prompt("", ids, {}) for ids in ([5, 3, 8, 2, 9], [4, 7], [6], [2, 2, 10])]
SETTINGS = Config(batch_size=4, mini_batch_size=4, max_new_tokens=8)


def fixed_for(policy: PolicyModel) -> Fixed:
    return Fixed(frozen_copy(policy), letter_tokenizer(), {})


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_an_untouched_policy_passes(family):
    policy = tiny_policy(family)
    check_invariants(policy, fixed_for(policy), PROMPTS, SETTINGS)


def test_a_sampler_at_another_temperature_is_diagnosed(monkeypatch):
    policy = tiny_policy("gpt2")
    real = generate.sampling_options
    monkeypatch.setattr(generate, "sampling_options", lambda config: real(config) | {"temperature": 0.5})
    with pytest.raises(RunError, match="sampling and scoring disagree by"):
        check_invariants(policy, fixed_for(policy), PROMPTS, SETTINGS)


def test_a_reference_with_other_weights_is_diagnosed():
    policy = tiny_policy("gpt2")
    fixed = fixed_for(policy)
    with torch.no_grad():
        policy.language_model.transformer.h[0].mlp.c_fc.weight.add_(0.05)
    with pytest.raises(RunError, match="policy and reference differ by"):
        check_invariants(policy, fixed, PROMPTS, SETTINGS)


def test_dropout_is_diagnosed_where_an_update_would_have_it():
    """A module that drops nothing in eval mode does in train mode, which the check switches on as an update does."""
    policy = tiny_policy("gpt2").eval()
    fixed = fixed_for(policy)
    policy.language_model.transformer.drop = torch.nn.Dropout(0.1)
    with pytest.raises(RunError, match=r"dropout is on in language_model\.transformer\.drop"):
        check_invariants(policy, fixed, PROMPTS, SETTINGS)
    policy.language_model.transformer.drop.p = 0.0
    check_invariants(policy, fixed, PROMPTS, SETTINGS)


def test_dropout_that_is_no_module_is_noticed_by_the_ratio():
    """T5's attention keeps its probability as a plain number: no module gives it away, scoring twice does."""
    policy = tiny_policy("t5").eval()
    fixed = fixed_for(policy)
    for module in policy.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    with pytest.raises(RunError, match="the importance ratio is"):
        check_invariants(policy, fixed, PROMPTS, SETTINGS)


MASK = torch.tensor([[True, True, True], [True, False, False]])
EQUAL = dict.fromkeys(
    ("sampled", "scored", "scored_again", "padded", "reference"), torch.tensor([[-1.0, -2, -3], [-4, -5, -6]])
)
MISMATCHES = {
    "sampled": "sampling and scoring disagree by",
    "scored_again": r"the importance ratio is .* before any update, not 1: scoring is random",
    "padded": "three more columns of padding beside the prompts move a token's log-probability by",
    "reference": "policy and reference differ by",
}


def nudge(logprobs: torch.Tensor, by: float, place: tuple[int, int]) -> torch.Tensor:
    logprobs = logprobs.clone()
    logprobs[place] += by
    return logprobs


@pytest.mark.parametrize("by", [0.01, -0.01, math.nan])
@pytest.mark.parametrize("name", MISMATCHES)
def test_one_token_that_differs_is_enough_and_says_which_two_disagree(name, by):
    other = EQUAL | {name: nudge(EQUAL[name], by, (1, 0))}
    with pytest.raises(RunError, match=MISMATCHES[name]):
        compare_logprobs(SETTINGS, mask=MASK, **other)
    compare_logprobs(SETTINGS, mask=MASK, **EQUAL)


@pytest.mark.parametrize("name", MISMATCHES)
def test_what_stands_beyond_the_mask_is_not_compared(name):
    compare_logprobs(SETTINGS, mask=MASK, **EQUAL | {name: nudge(EQUAL[name], math.nan, (1, 1))})


@pytest.mark.parametrize(
    ("settings", "gap", "passes"),
    [
        ({}, 9e-4, True),
        ({}, 1.1e-3, False),
        ({"mixed_precision": "bf16"}, 0.4, True),
        ({"mixed_precision": "bf16"}, 1.1, False),
        ({"dtype": "float16", "lora_r": 1}, 0.19, True),
        ({"dtype": "float16", "lora_r": 1}, 0.21, False),
        ({"dtype": "bfloat16", "lora_r": 1}, 0.4, True),
        ({"load_in_4bit": True, "lora_r": 1}, 0.4, True),
        ({"load_in_4bit": True, "lora_r": 1}, 1.1, False),
        ({"load_in_8bit": True, "lora_r": 1}, 2.9, True),
        ({"load_in_8bit": True, "lora_r": 1, "mixed_precision": "bf16"}, 2.9, True),
        ({"load_in_8bit": True, "lora_r": 1}, 3.1, False),
    ],
)
@pytest.mark.parametrize("name", MISMATCHES)
def test_the_tolerance_of_a_token_goes_with_the_precision(settings, gap, passes, name):
    """One of a hundred tokens is off, which the mean hardly notices."""
    mask = torch.ones(2, 50, dtype=torch.bool)
    equal = dict.fromkeys(EQUAL, torch.full((2, 50), -2.0))
    other = equal | {name: nudge(equal[name], gap, (0, 0))}
    with nullcontext() if passes else pytest.raises(RunError):
        compare_logprobs(Config(**settings), mask=mask, **other)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"mixed_precision": "bf16"}, 0.1),
        ({"dtype": "float16", "lora_r": 1}, 0.02),
        ({"load_in_8bit": True, "lora_r": 1}, 0.1),
    ],
)
@pytest.mark.parametrize("name", MISMATCHES)
def test_coarse_numbers_may_not_be_off_on_average(settings, tolerance, name):
    """What is wrong with every token shows here, though none is as far off as the worst may be."""
    compare_logprobs(Config(**settings), mask=MASK, **EQUAL | {name: EQUAL[name] + 0.9 * tolerance})
    with pytest.raises(RunError, match=MISMATCHES[name]):
        compare_logprobs(Config(**settings), mask=MASK, **EQUAL | {name: EQUAL[name] - 1.1 * tolerance})


def test_an_8_bit_reference_may_differ_and_is_told_of(capsys):
    config = Config(reference_in_8bit=True)
    compare_logprobs(config, mask=MASK, **EQUAL | {"reference": nudge(EQUAL["reference"], 0.25, (0, 0))})
    assert "policy and 8-bit reference differ by 0.062 nats a token and 0.25 at most" in capsys.readouterr().out


def test_the_check_draws_what_the_first_update_will(monkeypatch):
    """On the same prompts: what it vouches for is what is then trained on."""
    policy, drawn = tiny_policy("gpt2"), []
    real = generate.respond
    monkeypatch.setattr(preflight, "respond", lambda *args: (drawn.append(real(*args)), drawn[-1])[1])
    fixed = fixed_for(policy)._replace(terms={"zero": lambda prompts, responses, rows: torch.zeros(len(responses))})
    config = Config(batch_size=4, mini_batch_size=2, max_new_tokens=8, n_updates=1, reward_weights="zero=1")
    check_invariants(policy, fixed, PROMPTS, config)
    ((rollout, _),) = train(new_state(copy.deepcopy(policy), config), fixed, PROMPTS, config)
    order = [PROMPTS.index(prompt) for prompt in rollout.prompts]
    assert sorted(order) == [0, 1, 2, 3]
    check_invariants(policy, fixed, rollout.prompts, config)
    assert drawn[1].texts == rollout.texts[:2]
