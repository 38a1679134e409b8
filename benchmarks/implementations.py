"""PPO of other packages behind one interface, for conformance.py: each adapter calls the package's own functions.

Where a package has its mathematics inside a training loop, the loop itself runs, on a `World` whose models say what
they are told to. What is left out of an environment (vllm, flash_attn, deepspeed) is stood in for at import, and not
called.
"""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import MagicMock, patch

import torch
from torch import nn

CLIP = 0.2  # of the ratio and of the value, everywhere
PAD, EOS = 0, 1  # ids of every toy vocabulary here


class Batch(NamedTuple):
    """A rollout in columns of response tokens: (batch, time), but for `scores`, (batch,)."""

    mask: torch.Tensor
    scores: torch.Tensor
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    old_values: torch.Tensor
    new_logprobs: torch.Tensor
    new_values: torch.Tensor


class Loss(NamedTuple):
    """Of one optimizer step: the two losses, the clip fractions, and the losses' gradients; None: not reported."""

    policy: float
    value: float
    clip_fraction: float | None
    value_clip_fraction: float | None
    policy_gradient: torch.Tensor  # with respect to new_logprobs
    value_gradient: torch.Tensor  # with respect to new_values


class Scored(NamedTuple):
    """What a package makes of prompts and responses: which tokens it trains, their log-probabilities and values."""

    mask: torch.Tensor
    logprobs: torch.Tensor
    values: torch.Tensor | None


class Implementation(NamedTuple):
    """A PPO for language models, as the oracles see it; None where a package has no such piece."""

    version: str
    estimators: tuple[str, ...]  # of the KL in the reward, the default first
    kl: Callable | None  # (logprobs, ref_logprobs, mask, estimator) -> (batch, time)
    rewards: Callable  # (batch, kl_coef, estimator) -> (batch, time)
    advantages: Callable  # (rewards, values, mask, gamma, lam) -> advantages before whitening, returns or None
    estimate: Callable  # (batch, kl_coef, estimator, gamma, lam) -> advantages before whitening: both of the above
    whiten: Callable  # (x, mask) -> as advantages are whitened
    loss: Callable  # (batch, advantages, returns) -> Loss
    step_gradient: Callable  # (batch, advantages, returns, n_parts) -> of the policy loss, accumulated over the parts
    score: (
        Callable  # (query_ids, response_ids, table, values) -> Scored, by a model with those bigram logits and values
    )
    score_encoder_decoder: Callable | None = None  # the same, of an encoder-decoder


class Told(nn.Module):
    """Log-probabilities and values as parameters."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.logprobs = nn.Parameter(batch.new_logprobs.clone())
        self.values = nn.Parameter(batch.new_values.clone())


def gradients(policy_loss: torch.Tensor, value_loss: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the losses, with respect to the new log-probabilities and the new values."""
    (policy,) = torch.autograd.grad(policy_loss, batch.new_logprobs, retain_graph=True)
    (value,) = torch.autograd.grad(value_loss, batch.new_values)
    return policy, value


def differentiable(batch: Batch) -> Batch:
    new = {name: getattr(batch, name).clone().requires_grad_() for name in ("new_logprobs", "new_values")}
    return batch._replace(**new)


def rows_of(batch: Batch, rows) -> Batch:
    return Batch(*(tensor[rows] for tensor in batch))


def in_turn(rewards: Callable, advantages: Callable) -> Callable:
    def estimate(batch, kl_coef, estimator, gamma, lam):
        return advantages(rewards(batch, kl_coef, estimator), batch.old_values, batch.mask, gamma, lam)[0]

    return estimate


def equal_parts(n_rows: int, n_parts: int) -> list[slice]:
    size = n_rows // n_parts
    return [slice(start, start + size) for start in range(0, n_rows, size)]


# --------------------------------------------------------------------------------------------------------------------
# This project
# --------------------------------------------------------------------------------------------------------------------


def told_policy(batch: Batch) -> nn.Module:
    """A policy of ours whose log-probabilities and values are parameters; a query is the number of its row."""
    from model import PolicyModel

    class ToldPolicy(PolicyModel):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.told = Told(batch)

        def forward(self, query_ids, response_ids, **_) -> SimpleNamespace:
            here = query_ids[:, 0], slice(response_ids.shape[1])
            return SimpleNamespace(logprobs=self.told.logprobs[here], values=self.told.values[here], entropy=None)

    return ToldPolicy()


def ours() -> Implementation:
    import ppo
    import train
    from config import Config

    settings = {"kl_coef": 0.05, "clip_range": CLIP, "clip_range_value": CLIP, "value_coef": 1.0}

    def rollout(batch, advantages, returns) -> train.Rollout:
        numbers = torch.arange(len(batch.mask))[:, None]
        told = {"query_ids": numbers, "query_mask": torch.ones_like(numbers, dtype=torch.bool), "mask": batch.mask}
        told |= {"response_ids": batch.mask.long(), "logprobs": batch.old_logprobs, "values": batch.old_values}
        told |= {"advantages": advantages, "returns": returns}
        names = train.Rollout.__dataclass_fields__
        return train.Rollout(**{name: told.get(name) for name in names})

    def rewards(batch, kl_coef, estimator):
        kl = ppo.kl_estimate(
            logprobs=batch.old_logprobs, other_logprobs=batch.ref_logprobs, mask=batch.mask, estimator=estimator
        )
        return ppo.shape_rewards(scores=batch.scores, kl=kl, mask=batch.mask, kl_coef=kl_coef)

    def advantages(rewards, values, mask, gamma, lam):
        found = ppo.estimate_advantages(rewards=rewards, values=values, mask=mask, gamma=gamma, lam=lam)
        return found, ppo.estimate_returns(advantages=found, values=values, mask=mask)

    def step(batch, advantages, returns, n_parts):
        policy, rows = told_policy(batch), torch.arange(len(batch.mask))
        size = len(rows) // n_parts
        config = Config(mini_batch_size=size, batch_size=len(rows), gradient_accumulation_steps=n_parts, **settings)
        stats = train.accumulate_gradient(policy, rollout(batch, advantages, returns), rows, config)
        return policy.told, stats

    def loss(batch, advantages, returns):
        told, stats = step(batch, advantages, returns, 1)
        return Loss(
            policy=stats["policy_loss"],
            value=stats["value_loss"],
            clip_fraction=stats["clip_fraction"],
            value_clip_fraction=stats["value_clip_fraction"],
            policy_gradient=told.logprobs.grad,
            value_gradient=told.values.grad,
        )

    return Implementation(
        version="this repository",
        estimators=("k1", "k2", "k3", "abs"),
        kl=ppo.kl_estimate,
        rewards=rewards,
        advantages=advantages,
        estimate=in_turn(rewards, advantages),
        whiten=ppo.masked_whiten,
        loss=loss,
        step_gradient=lambda *arguments: step(*arguments)[0].logprobs.grad,
        score=our_score("causal"),
        score_encoder_decoder=our_score("encoder-decoder"),
    )


def our_score(family: str) -> Callable:
    """`PolicyModel.score` on a model whose one layer adds nothing: its logits are a table of bigrams."""
    import ppo
    from model import PolicyModel

    def score(query_ids, response_ids, table, values):
        from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

        n = len(table)
        shape = {"vocab_size": n, "pad_token_id": PAD, "eos_token_id": EOS}
        if family == "causal":
            shape |= {"hidden_size": n, "intermediate_size": n, "num_hidden_layers": 1, "num_attention_heads": 1}
            model = LlamaForCausalLM(LlamaConfig(**shape, rms_norm_eps=0.0, tie_word_embeddings=False)).double()
        else:
            shape |= {"d_model": n, "d_ff": n, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 1, "d_kv": n}
            shape |= {"decoder_start_token_id": PAD, "layer_norm_epsilon": 0.0, "scale_decoder_outputs": False}
            model = T5ForConditionalGeneration(T5Config(**shape, tie_word_embeddings=False)).double()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", ".o.weight", ".wo.weight")):
                    weight.zero_()
            model.get_input_embeddings().weight.copy_(torch.eye(n))  # a token's state: √n of its unit vector
            model.get_output_embeddings().weight.copy_(table.T / n**0.5)
            policy = PolicyModel(model.eval())
            policy.value_head.weight.copy_(values / n**0.5)
        mask = ppo.response_mask(response_ids, EOS)
        inputs = {"query_ids": query_ids, "query_mask": torch.ones_like(query_ids, dtype=torch.bool)}
        with torch.no_grad():
            found = policy(**inputs, response_ids=response_ids, response_mask=mask)
        return Scored(mask=mask, logprobs=found.logprobs, values=found.values)

    return score


# --------------------------------------------------------------------------------------------------------------------
# TRL 0.11: methods of PPOTrainer, on a stand-in for `self`
# --------------------------------------------------------------------------------------------------------------------


def accumulating(parameters: nn.Module, n_parts: int):
    """Accelerate as a trainer has it, and SGD of rate 1: what parameters lose is their gradient."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=n_parts)
    return accelerator, accelerator.prepare(torch.optim.SGD(parameters.parameters(), lr=1.0))


TRL_NAMES = {"k1": "kl", "k2": "mse", "abs": "abs"}


def trl_trainer(n_rows: int, kl_coef=0.2, estimator="k1", **settings) -> SimpleNamespace:
    """What the methods of TRL 0.11's PPOTrainer read of `self`, and the methods."""
    from trl import PPOConfig, PPOTrainer
    from trl.trainer.utils import FixedKLController

    config = PPOConfig(
        batch_size=n_rows, mini_batch_size=n_rows, kl_penalty=TRL_NAMES[estimator], vf_coef=1.0, **settings
    )
    me = SimpleNamespace(config=config, kl_ctl=FixedKLController(kl_coef), is_encoder_decoder=False)
    for name in ("_kl_penalty", "compute_rewards", "compute_advantages", "loss", "train_minibatch"):
        setattr(me, name, types.MethodType(getattr(PPOTrainer, name), me))
    return me


def trl_step_gradient(batch, advantages, returns, n_parts):
    me, told = trl_trainer(len(batch.mask)), Told(batch)
    me.model = told
    me.accelerator, me.optimizer = accumulating(told, n_parts)
    for rows in equal_parts(len(batch.mask), n_parts):
        part = rows_of(batch, rows)
        with me.accelerator.accumulate(told):
            me.train_minibatch(
                old_logprobs=part.old_logprobs,
                values=part.old_values,
                logprobs=told.logprobs[rows],
                logits=torch.zeros(*part.mask.shape, 3),
                vpreds=told.values[rows],
                mask=part.mask.long(),
                advantages=advantages[rows],
                returns=returns[rows],
            )
    return batch.new_logprobs - told.logprobs.detach()


def trl_score(query_ids, response_ids, table, values, is_encoder_decoder=False) -> Scored:
    from trl import PPOTrainer

    me = trl_trainer(len(query_ids))
    me.is_encoder_decoder = is_encoder_decoder
    ends = first_ends(response_ids)
    responses = [row[:end] for row, end in zip(response_ids, ends, strict=True)]
    start = torch.full_like(query_ids[:, :1], PAD) if is_encoder_decoder else query_ids
    ids = torch.cat([start, response_ids], 1)
    reached = torch.arange(ids.shape[1]) < start.shape[1] + torch.tensor(ends)[:, None]
    inputs = {"input_ids": ids, "attention_mask": reached.long()}
    if is_encoder_decoder:
        inputs = {f"decoder_{name}": tensor for name, tensor in inputs.items()}
        inputs |= {"input_ids": query_ids, "attention_mask": torch.ones_like(query_ids)}
    model = MagicMock(side_effect=lambda **_: (table[ids], None, values[ids]))
    # As generate() hands them to step(): an encoder-decoder's responses begin with the decoder's start token.
    handed = [torch.cat([start[0], row]) for row in responses] if is_encoder_decoder else responses
    logprobs, _, found, mask = PPOTrainer.batched_forward_pass(me, model, list(query_ids), handed, inputs)
    columns = slice(start.shape[1] - 1, None)
    return Scored(mask[:, columns].bool(), logprobs[:, columns], found[:, columns])


def trl_0_11() -> Implementation:
    from trl import core

    def rewards(batch, kl_coef, estimator):
        me = trl_trainer(len(batch.mask), kl_coef, estimator)
        return me.compute_rewards(batch.scores, batch.old_logprobs, batch.ref_logprobs, batch.mask.long())[0]

    def advantages(rewards, values, mask, gamma, lam):
        me = trl_trainer(len(mask), gamma=gamma, lam=lam)
        values, _, returns = me.compute_advantages(values, rewards, mask.long())
        return returns - values, returns

    def loss(batch, advantages, returns):
        batch = differentiable(batch)
        logits = torch.zeros(*batch.mask.shape, 3)
        mask = batch.mask.long()
        policy, value, stats = trl_trainer(len(mask)).loss(
            batch.old_logprobs,
            batch.old_values,
            logits,
            batch.new_values,
            batch.new_logprobs,
            mask,
            advantages,
            returns,
        )
        fractions = stats["policy/clipfrac"].item(), stats["val/clipfrac"].item()
        return Loss(policy.item(), value.item(), *fractions, *gradients(policy, value, batch))

    return Implementation(
        version=version("trl"),
        estimators=("k1", "k2", "abs"),
        kl=lambda logprobs, ref, mask, estimator: trl_trainer(len(mask), estimator=estimator)._kl_penalty(
            logprobs, ref
        ),
        rewards=rewards,
        advantages=advantages,
        estimate=in_turn(rewards, advantages),
        whiten=lambda x, mask: core.masked_whiten(x, mask.long()),
        loss=loss,
        step_gradient=trl_step_gradient,
        score=trl_score,
        score_encoder_decoder=lambda *arguments: trl_score(*arguments, is_encoder_decoder=True),
    )


def first_ends(response_ids: torch.Tensor) -> list[int]:
    """Lengths up to and including the first EOS, in plain Python."""
    return [row.index(EOS) + 1 if EOS in row else len(row) for row in response_ids.tolist()]


# --------------------------------------------------------------------------------------------------------------------
# Trainers whose mathematics is in their loop: TRL 1.x, torchtune
# --------------------------------------------------------------------------------------------------------------------


class World(NamedTuple):
    """Models that say what they are told to: functions of token ids (batch, query + time)."""

    query_ids: torch.Tensor
    response_ids: torch.Tensor
    scores: torch.Tensor
    old_logits: Callable
    ref_logits: Callable
    new_logits: Callable
    old_values: Callable
    new_values: Callable
    told: nn.Module


def told_world(batch: Batch) -> World:
    """One in which response tokens have the batch's log-probabilities and values; a query is the number of its row."""
    n_rows, time = batch.mask.shape
    word, vocab = 2, 4
    lengths = batch.mask.sum(1, keepdim=True)
    columns = torch.arange(time)
    response_ids = torch.where(columns < lengths, word, PAD)
    response_ids[(columns == lengths - 1) & (lengths < time)] = EOS
    told = Told(batch)

    def logits(logprobs: torch.Tensor) -> Callable:
        def of(ids: torch.Tensor) -> torch.Tensor:
            rows = ids[:, 0] - vocab
            chosen = logprobs[rows]  # (batch, time)
            others = torch.log(-torch.expm1(chosen) / (vocab - 1))
            is_chosen = nn.functional.one_hot(response_ids[rows], vocab).bool()
            spread = torch.where(is_chosen, chosen[..., None], others[..., None])
            return nn.functional.pad(spread, (0, 0, 0, 1))  # the last token's prediction is not used

        return of

    def values(found: torch.Tensor) -> Callable:
        return lambda ids: nn.functional.pad(found[ids[:, 0] - vocab], (0, 1))

    return World(
        query_ids=torch.arange(n_rows)[:, None] + vocab,
        response_ids=response_ids,
        scores=batch.scores,
        old_logits=logits(batch.old_logprobs),
        ref_logits=logits(batch.ref_logprobs),
        new_logits=logits(told.logprobs),
        old_values=values(batch.old_values),
        new_values=values(told.values),
        told=told,
    )


def bigram_world(query_ids, response_ids, table, values) -> World:
    told = nn.ParameterList([table.clone(), values.clone()])
    return World(
        query_ids=query_ids,
        response_ids=response_ids,
        scores=torch.zeros(len(query_ids)),
        old_logits=lambda ids: table[ids],
        ref_logits=lambda ids: table[ids],
        new_logits=lambda ids: told[0][ids],
        old_values=lambda ids: values[ids],
        new_values=lambda ids: told[1][ids],
        told=told,
    )


NO_KL = {"kl_coef": 0.0, "estimator": "k1", "gamma": 0.0, "lam": 0.0}
THROUGH_KL = 1000.0  # a price of KL by which rewards are told: r = 1000 (log ρ - log π) where log ρ = log π + r / 1000


class Seen(NamedTuple):
    """What was seen of an update."""

    advantages: torch.Tensor  # before whitening
    returns: torch.Tensor | None
    mask: torch.Tensor  # of the tokens that the policy loss counts
    logprobs: torch.Tensor
    loss: Loss


def from_loop(drive: Callable, name: str, estimators: tuple[str, ...], whiten: Callable) -> Implementation:
    """The interface for a trainer, from `drive`, which runs an update in a `World`."""

    def blank(mask: torch.Tensor) -> Batch:
        ones = torch.ones(mask.shape)
        return Batch(mask, torch.zeros(len(mask)), -ones, -ones, 0 * ones, -ones, 0 * ones)

    def rewards(batch, kl_coef, estimator):
        batch = batch._replace(old_values=torch.zeros_like(batch.old_values))
        return drive(told_world(batch), **NO_KL | {"kl_coef": kl_coef, "estimator": estimator}).advantages

    def advantages(rewards, values, mask, gamma, lam):
        batch = blank(mask)
        batch = batch._replace(ref_logprobs=batch.old_logprobs + rewards / THROUGH_KL, old_values=values)
        seen = drive(told_world(batch), kl_coef=THROUGH_KL, estimator="k1", gamma=gamma, lam=lam)
        return seen.advantages, seen.returns

    def update(batch, advantages, returns, n_parts=1):
        ref_logprobs = batch.old_logprobs + torch.where(batch.mask, returns, 0.0) / THROUGH_KL
        told = batch._replace(ref_logprobs=ref_logprobs, scores=torch.zeros_like(batch.scores))
        settings = NO_KL | {"kl_coef": THROUGH_KL}
        return drive(told_world(told), advantages=advantages, n_parts=n_parts, **settings).loss

    def estimate(batch, kl_coef, estimator, gamma, lam):
        world = told_world(batch)
        return drive(world, kl_coef=kl_coef, estimator=estimator, gamma=gamma, lam=lam).advantages

    def score(query_ids, response_ids, table, values):
        seen = drive(bigram_world(query_ids, response_ids, table, values), **NO_KL)
        return Scored(mask=seen.mask, logprobs=seen.logprobs, values=-seen.advantages)

    return Implementation(
        version=version(name),
        estimators=estimators,
        kl=None,
        rewards=rewards,
        advantages=advantages,
        estimate=estimate,
        whiten=whiten,
        loss=update,
        step_gradient=lambda *arguments: update(*arguments).policy_gradient,
        score=score,
    )


def trl_1_models(world: World) -> dict[str, Callable]:
    """What stands in the trainer's module for sampling, scoring and rewarding."""
    ids = torch.cat([world.query_ids, world.response_ids], 1)

    def forward(model, ids, pad):
        if model == "reference":
            return SimpleNamespace(logits=world.ref_logits(ids))
        return SimpleNamespace(logits=world.new_logits(ids)), world.new_values(ids)[..., None]

    def get_reward(model, ids, pad, context_length):
        return (world.old_values(ids)[..., None], None, None) if model == "values" else (None, world.scores, None)

    def batch_generation(model, queries, rows_at_once, pad, config):
        return ids, world.old_logits(ids)[:, queries.shape[1] - 1 : -1] / config.temperature

    return {"forward": forward, "get_reward": get_reward, "batch_generation": batch_generation}


def trl_1_trainer(world: World, n_parts: int, **settings) -> MagicMock:
    """What `PPOTrainer.train` reads of `self`, for one update in one minibatch of so many parts."""
    n_rows, time = world.response_ids.shape
    me = MagicMock()
    me.args = SimpleNamespace(
        **{"response_length": time, "temperature": 1.0, "num_total_batches": 1, "num_ppo_epochs": 1},
        **{"num_mini_batches": 1, "gradient_accumulation_steps": n_parts, "total_episodes": n_rows},
        **{"batch_size": n_rows, "local_batch_size": n_rows, "local_mini_batch_size": n_rows},
        **{"local_rollout_forward_batch_size": n_rows, "per_device_train_batch_size": n_rows // n_parts},
        **{"cliprange": CLIP, "cliprange_value": CLIP, "vf_coef": 1.0, "whiten_rewards": False},
        **{"missing_eos_penalty": None, "num_sample_generations": 0, "ds3_gather_for_generation": False},
        **{"logging_steps": None, "eval_steps": None, "save_steps": None},
        **settings,
    )
    me.accelerator, me.optimizer = accumulating(world.told, n_parts)
    me.accelerator.unwrap_model = lambda model: model
    me.model = SimpleNamespace(policy="policy", value_model="values", train=lambda: None)
    me.ref_model, me.reward_model = "reference", "rewards"
    me.processing_class = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)
    me.stop_token_id, me.is_deepspeed_enabled = EOS, False
    me.dataloader, me.train_dataset_len = [{"input_ids": world.query_ids}], n_rows
    me.state, me.logged = SimpleNamespace(), {}
    me.log = me.logged.update
    for moment in ("on_train_begin", "on_step_end", "on_train_end"):
        getattr(me.callback_handler, moment).return_value = SimpleNamespace(should_save=False)
    return me


def trl_1() -> Implementation:
    from trl.experimental.ppo import ppo_trainer

    def drive(world, kl_coef, estimator, gamma, lam, advantages=None, n_parts=1) -> Seen:
        seen = SimpleNamespace(logprobs=[])

        def whiten(x, mask, **settings):
            seen.advantages, seen.mask = x, mask
            return real["masked_whiten"](x, mask, **settings) if advantages is None else advantages

        def log_softmax(logits, index):
            seen.logprobs.append(real["selective_log_softmax"](logits, index))
            return seen.logprobs[-1]

        replaced = trl_1_models(world) | {"masked_whiten": whiten, "selective_log_softmax": log_softmax}
        replaced |= {"unwrap_model_for_generation": lambda model, *_, **__: contextlib.nullcontext(model)}
        replaced |= {"np": SimpleNamespace(random=SimpleNamespace(permutation=torch.arange))}
        real = {name: getattr(ppo_trainer, name) for name in replaced}
        before = [parameter.detach().clone() for parameter in world.told.parameters()]
        me = trl_1_trainer(world, n_parts, kl_coef=kl_coef, kl_estimator=estimator, gamma=gamma, lam=lam)
        with patch.multiple(ppo_trainer, **replaced):
            ppo_trainer.PPOTrainer.train(me)
        changes = [old - new.detach() for old, new in zip(before, world.told.parameters(), strict=True)]
        loss = Loss(
            policy=me.logged["loss/policy_avg"],
            value=me.logged["loss/value_avg"],
            clip_fraction=me.logged["policy/clipfrac_avg"],
            value_clip_fraction=me.logged["val/clipfrac_avg"],
            policy_gradient=changes[0],
            value_gradient=changes[1],
        )
        return Seen(seen.advantages, None, seen.mask, seen.logprobs[0], loss)

    return from_loop(drive, "trl", ("k1", "k3"), ppo_trainer.masked_whiten)


def torchtune_recipe():
    """The module of the recipe, which is a script beside the package."""
    from torchtune import rlhf

    path = Path(rlhf.__file__).parents[2] / "recipes/ppo_full_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location("ppo_recipe", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def torchtune_trainer(trainer: type, world: World, n_parts: int, kl_coef: float, gamma: float, lam: float) -> MagicMock:
    """What the recipe's `train` reads of `self`, for one update in one minibatch of so many parts."""
    from torchtune.rlhf.loss import PPOLoss

    n_rows, time = world.response_ids.shape
    me = MagicMock()
    me.configure_mock(
        **{"compile": False, "_optimizer_in_bwd": False, "_total_steps": 1, "_steps_run": 0, "_epochs_run": 0},
        **{"_total_epochs": 1, "profiler_profile_memory": False, "_device": torch.device("cpu")},
        **{"batch_size": n_rows, "_forward_batch_size": n_rows, "_max_generated_tokens": time, "global_step": 0},
        **{"_temperature": 1.0, "_penalise_no_eos": False, "_min_response_length": None, "_kl_coeff": kl_coef},
        **{"_gamma": gamma, "_lmbda": lam, "_ppo_epochs": 1, "_ppo_batch_size": n_rows},
        **{"_ppo_backward_batch_size": n_rows // n_parts, "_gradient_accumulation_steps": n_parts},
        **{"_log_every_n_steps": 2, "_stop_token_ids": torch.tensor([EOS]), "enable_kv_cache": False},
        **{"_dataloader": [{"tokens": world.query_ids}], "parts": []},
    )

    def values_of(ids, **_):
        return (world.new_values if torch.is_grad_enabled() else world.old_values)(ids)[..., None]

    def ppo_step(*arguments):
        me.parts.append(trainer.ppo_step(me, *arguments))
        return me.parts[-1]

    me.ppo_step, me._value_model = ppo_step, values_of
    me._tokenizer.pad_id = PAD
    me._loss_fn = PPOLoss(epsilon=CLIP, value_clip_range=CLIP, value_coeff=1.0)
    me.cache_ctx_manager = lambda *_, **__: contextlib.nullcontext()
    me._policy_model = lambda ids, **_: world.new_logits(ids)
    me._ref_policy_model = lambda ids, **_: world.ref_logits(ids)
    me._reward_model = lambda ids, **_: world.scores[:, None, None].repeat(1, ids.shape[1], 1)
    for name in ("generate_trajectory", "generate_trajectory_batched"):
        setattr(me, name, types.MethodType(getattr(trainer, name), me))
    return me


def torchtune() -> Implementation:
    from torchtune import rlhf

    recipe = torchtune_recipe()
    trainer = recipe.PPOFullFinetuneRecipeSingleDevice
    real = {name: getattr(rlhf, name) for name in ("estimate_advantages", "logits_to_logprobs")}

    def drive(world, kl_coef, estimator, gamma, lam, advantages=None, n_parts=1) -> Seen:
        ids = torch.cat([world.query_ids, world.response_ids], 1)
        seen = SimpleNamespace(logprobs=[])

        def estimate(values, rewards, gamma, lmbda, masks):
            whitened, seen.returns = real["estimate_advantages"](values, rewards, gamma, lmbda, masks=masks)
            seen.advantages, seen.mask = seen.returns - values, masks
            return whitened if advantages is None else advantages, seen.returns

        def logits_to_logprobs(*arguments):
            seen.logprobs.append(real["logits_to_logprobs"](*arguments))
            return seen.logprobs[-1]

        def generate(**_):
            return ids.clone(), world.old_logits(ids)[:, world.query_ids.shape[1] - 1 : -1]

        me = torchtune_trainer(trainer, world, n_parts, kl_coef=kl_coef, gamma=gamma, lam=lam)
        replaced = {"estimate_advantages": estimate, "logits_to_logprobs": logits_to_logprobs}
        in_order = patch.object(torch, "randperm", lambda n, **_: torch.arange(n))
        with patch.multiple(rlhf, **replaced), patch.object(recipe.generation, "generate", generate), in_order:
            trainer.train(me)
        stats = recipe.PPOStats(*map(sum, zip(*me.parts, strict=True)))
        found = [parameter.grad for parameter in world.told.parameters()]
        loss = Loss(
            policy=stats.policy_loss.item(),
            value=stats.value_loss.item(),
            clip_fraction=stats.clipfrac.item(),
            value_clip_fraction=None,
            policy_gradient=found[0],
            value_gradient=found[1],
        )
        return Seen(seen.advantages, seen.returns, seen.mask, seen.logprobs[0], loss)

    return from_loop(drive, "torchtune", ("k1",), lambda x, mask: rlhf.whiten(x, mask=mask))


# --------------------------------------------------------------------------------------------------------------------
# verl
# --------------------------------------------------------------------------------------------------------------------


def verl_scores(batch: Batch) -> torch.Tensor:
    """The scores where verl's reward manager puts them."""
    from verl import DataProto
    from verl.workers.reward_manager.naive import NaiveRewardManager

    n_rows = len(batch.mask)
    query = torch.ones(n_rows, 1, dtype=torch.long)
    told = {"prompts": query, "responses": batch.mask.long() + 1}
    told["attention_mask"] = torch.cat([query, batch.mask.long()], 1)
    data = DataProto.from_single_dict(told)
    data.non_tensor_batch["reward_model"] = as_objects([{"ground_truth": ""}] * n_rows)
    data.non_tensor_batch["data_source"] = as_objects(["told"] * n_rows)
    tokenizer = SimpleNamespace(decode=lambda *_, **__: "")
    scores = iter(batch.scores.tolist())
    manager = NaiveRewardManager(tokenizer, num_examine=0, compute_score=lambda **_: next(scores))
    return manager(data).to(batch.scores.dtype)


def verl_score(query_ids, response_ids, table, values) -> Scored:
    from verl import DataProto
    from verl.utils import torch_functional
    from verl.workers.utils.padding import no_padding_2_padding

    response_mask = torch_functional.get_response_mask(response_ids, EOS)
    reached = torch.cat([torch.ones_like(query_ids), response_mask], 1)
    told = {"prompts": query_ids, "responses": response_ids, "attention_mask": reached}
    data = DataProto.from_single_dict(told).batch
    ids = torch.cat([query_ids, response_ids], 1)[reached.bool()]  # rows one after the other, without padding
    logprobs = torch_functional.logprobs_from_logits(table[ids], ids.roll(-1))
    data["attention_mask"] = reached
    found = [no_padding_2_padding(flat, data) for flat in (logprobs, values[ids])]
    return Scored(response_mask.bool(), *found)


def verl() -> Implementation:
    from verl import DataProto
    from verl.trainer.ppo import core_algos, ray_trainer
    from verl.utils import torch_functional
    from verl.workers.config import ActorConfig

    def rewards(batch, kl_coef, estimator):
        told = {"response_mask": batch.mask.long(), "token_level_scores": verl_scores(batch)}
        told |= {"old_log_probs": batch.old_logprobs, "ref_log_prob": batch.ref_logprobs}
        controller = core_algos.FixedKLController(kl_coef)
        data, _ = ray_trainer.apply_kl_penalty(DataProto.from_single_dict(told), controller, kl_penalty=estimator)
        return data.batch["token_level_rewards"]

    def advantages(rewards, values, mask, gamma, lam):
        _, returns = core_algos.compute_gae_advantage_return(rewards, values, mask.long(), gamma, lam)
        return returns - values, returns

    def losses(batch, advantages, returns, n_tokens=None):
        config = ActorConfig(
            strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, ppo_mini_batch_size=1, clip_ratio=CLIP
        )
        config.global_batch_info.update(dp_size=1, batch_num_tokens=n_tokens)
        mask = batch.mask
        policy, metrics = core_algos.compute_policy_loss_vanilla(
            batch.old_logprobs, batch.new_logprobs, advantages, mask, loss_agg_mode="token-mean", config=config
        )
        value, fraction = core_algos.compute_value_loss(
            batch.new_values, returns, batch.old_values, mask, cliprange_value=CLIP, batch_num_tokens=n_tokens
        )
        return policy, value, metrics["actor/pg_clipfrac"], fraction.item()

    def loss(batch, advantages, returns):
        batch = differentiable(batch)
        policy, value, *fractions = losses(batch, advantages, returns)
        return Loss(policy.item(), value.item(), *fractions, *gradients(policy, value, batch))

    def step_gradient(batch, advantages, returns, n_parts):
        batch = differentiable(batch)
        n_tokens = batch.mask.sum()  # as the engine counts them before it goes over the parts
        for rows in equal_parts(len(batch.mask), n_parts):
            losses(rows_of(batch, rows), advantages[rows], returns[rows], n_tokens)[0].backward()
        return batch.new_logprobs.grad

    return Implementation(
        version=version("verl"),
        estimators=("k1", "k2", "k3", "abs"),
        kl=lambda logprobs, ref, mask, estimator: core_algos.kl_penalty(logprobs, ref, estimator),
        rewards=rewards,
        advantages=advantages,
        estimate=in_turn(rewards, advantages),
        whiten=lambda x, mask: torch_functional.masked_whiten(x, mask.long()),
        loss=loss,
        step_gradient=step_gradient,
        score=verl_score,
    )


def as_objects(items: list):
    import numpy

    array = numpy.empty(len(items), dtype=object)
    array[:] = items
    return array


# --------------------------------------------------------------------------------------------------------------------
# OpenRLHF
# --------------------------------------------------------------------------------------------------------------------


class StandIn(types.ModuleType):
    """A module that is not there, for what imports it and does not call it."""

    __path__: tuple = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


def stand_in(*names: str) -> None:
    for name in names:
        if name.split(".")[0] in sys.modules and not isinstance(sys.modules[name.split(".")[0]], StandIn):
            continue
        sys.modules[name] = StandIn(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)


def openrlhf_whiten(x, mask) -> torch.Tensor:
    from openrlhf.trainer.ppo_utils.experience import Experience
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    advantage = SimpleNamespace(estimator="gae", gamma=0.0, lambd=0.0, no_std_norm=False)
    args = MagicMock(algo=SimpleNamespace(advantage=advantage))
    args.rollout.n_samples_per_prompt, args.reward.clip_range = 1, None
    args.reward.overlong_buffer_len = args.reward.stop_properly_penalty_coef = None
    me = SimpleNamespace(strategy=SimpleNamespace(args=args), advantage_estimator="gae")
    me.kl_ctl = SimpleNamespace(value=1.0)
    me.get_advantages_and_returns = types.MethodType(RemoteExperienceMaker.get_advantages_and_returns, me)
    told = Experience(values=torch.zeros_like(x), rewards=torch.zeros(len(x)), kl=-x, action_mask=mask)
    told.index = list(range(len(x)))
    return RemoteExperienceMaker.compute_advantages_and_returns(me, [told])[0].advantages


def openrlhf_score(query_ids, response_ids, table, values) -> Scored:
    from openrlhf.models import Actor
    from openrlhf.trainer.ppo_utils.experience import Experience
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    ends = first_ends(response_ids)
    start = query_ids.shape[1]
    rows = []
    for query, response, end in zip(query_ids.tolist(), response_ids.tolist(), ends, strict=True):
        drawn = {"observation_tokens": query + response[:end], "action_ranges": [(start, start + end)]}
        drawn |= {"rollout_log_probs": None, "prompt": "", "label": ""}
        rows.append(SamplesGenerator._process_response_into_experience(None, drawn))
    whole = Experience.concat_experiences(rows, PAD)
    model = nn.Module()
    model.forward = lambda ids, **_: {"logits": table[ids]}
    actor = Actor(model)
    actor.packing_samples = False  # set by its constructor where that loads the model
    logprobs = actor(whole.sequences, whole.action_mask, attention_mask=whole.attention_mask)
    columns = slice(start - 1, None)
    return Scored(whole.action_mask[:, columns].bool(), logprobs[:, columns].double(), None)


def openrlhf() -> Implementation:
    stand_in("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", "deepspeed.runtime.zero.partition_parameters")
    stand_in("deepspeed.ops", "deepspeed.ops.adam", "deepspeed.utils", "vllm", "vllm.inputs", "vllm.utils")
    stand_in("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed")
    from openrlhf.models import PolicyLoss, ValueLoss
    from openrlhf.models.utils import compute_approx_kl, compute_reward
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
    from openrlhf.utils.loss_utils import iter_grad_accum_global_norm

    def kl(logprobs, ref_logprobs, mask, estimator):
        return compute_approx_kl(logprobs, ref_logprobs, kl_estimator=estimator).double()

    def rewards(batch, kl_coef, estimator):
        found = kl(batch.old_logprobs, batch.ref_logprobs, batch.mask, estimator)
        return compute_reward(batch.scores, kl_coef, found, action_mask=batch.mask)

    def advantages(rewards, values, mask, gamma, lam):
        return RemoteExperienceMaker.get_advantages_and_returns(None, values, rewards, mask, gamma, lam)

    def losses(batch, advantages, returns, **counts):
        policy, fraction, *_ = PolicyLoss(CLIP, CLIP)(
            batch.new_logprobs, batch.old_logprobs, advantages, action_mask=batch.mask, **counts
        )
        value = ValueLoss(CLIP)(batch.new_values, batch.old_values, returns, action_mask=batch.mask, **counts)
        return policy, value, fraction

    def loss(batch, advantages, returns):
        batch = differentiable(batch)
        policy, value, fraction = losses(batch, advantages, returns)
        return Loss(policy.item(), value.item(), fraction.item(), None, *gradients(policy, value, batch))

    def step_gradient(batch, advantages, returns, n_parts):
        batch = differentiable(batch)
        parts = equal_parts(len(batch.mask), n_parts)
        counted = iter_grad_accum_global_norm(parts, SimpleNamespace(), n_parts, lambda rows: batch.mask[rows])
        for rows, counts in counted:
            part_loss = losses(rows_of(batch, rows), advantages[rows], returns[rows], **counts)[0]
            (part_loss / n_parts).backward()  # the division is DeepSpeed's
        return batch.new_logprobs.grad

    return Implementation(
        version=version("openrlhf"),
        estimators=("k1", "k2", "k3"),
        kl=kl,
        rewards=rewards,
        advantages=advantages,
        estimate=in_turn(rewards, advantages),
        whiten=openrlhf_whiten,
        loss=loss,
        step_gradient=step_gradient,
        score=openrlhf_score,
    )


IMPLEMENTATIONS = {
    "ours": ours,
    "trl-0.11": trl_0_11,
    "trl-1": trl_1,
    "torchtune": torchtune,
    "openrlhf": openrlhf,
    "verl": verl,
}
