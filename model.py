"""What is trained: the policy with its value head, and the frozen reference that it is held to.

Both families of language models answer one question, `score`: given prompts and responses, how probable was each
response token, and what was the state before it worth? After that call nothing knows which family it was.

    causal (GPT-2, Llama):  pad pad x x x │ y0 y1 y2 eos     one sequence; the output at a token predicts the next
    encoder-decoder (T5):   x x x pad pad → start y0 y1 y2   the encoder reads x, the decoder predicts y0 y1 y2 eos
"""

import copy
from typing import NamedTuple

import torch
from torch import nn
from torchtyping import TensorType, is_float
from transformers import PreTrainedModel

from ppo import token_entropy, token_logprobs

PASS_TOKENS = 128  # one more pass reads all weights again: about the cost of so many tokens, as measured on a CPU


class Scores(NamedTuple):
    """Per response token: log-probability in nats, value in reward units, and entropy in nats where asked for."""

    logprobs: TensorType["batch", "time", is_float]
    values: TensorType["batch", "time", is_float]
    entropy: TensorType["batch", "time", is_float] | None


class PolicyModel(nn.Module):
    """A language model, and a scalar value head on one of three critics: the policy π and its values V.

    shared    the head reads the policy's own trunk: V(x, y_<t), nearly free, but two losses pull on one trunk
    separate  it reads a trunk of the critic's own: V(x, y_<t), twice the work
    encoder   it reads an encoder of the prompt alone: V(x), the same for every token of the response. An encoder that
              also read the response would see, at token t, the tokens after t, and its baseline would be biased.
              As no state after the prompt is valued, only λ = 1 leaves the policy gradient unbiased.

    The head starts at zero, so V = 0 until it has learned something, and its first loss leaves the trunk alone. It
    lives outside the language model, in float32, so that the latter saves and loads as if it were not there.
    """

    def __init__(
        self,
        language_model: nn.Module,  # of transformers, or wrapped by peft
        critic: PreTrainedModel | None = None,
        critic_kind: str = "shared",
        mixed_precision: bool = False,
    ) -> None:
        super().__init__()
        self.mixed_precision = mixed_precision
        self.language_model = language_model
        self.critic = critic
        self.critic_kind = critic_kind
        self.value_head = nn.Linear((critic or language_model).config.hidden_size, 1).to(language_model.device)
        for parameter in self.value_head.parameters():
            nn.init.zeros_(parameter)

    @property
    def is_encoder_decoder(self) -> bool:
        return self.language_model.config.is_encoder_decoder

    def autocast(self) -> torch.autocast:
        """Where forward passes run: with `mixed_precision`, matrix products in bfloat16 on weights in float32."""
        return torch.autocast(self.value_head.weight.device.type, torch.bfloat16, enabled=self.mixed_precision)

    @property
    def separator(self) -> str:
        """What stands between prompt and response as text: a causal model's response goes on in mid-sentence."""
        return "\n" if self.is_encoder_decoder else ""

    def score(
        self,
        query_ids: TensorType["batch", "query"],
        query_mask: TensorType["batch", "query", bool],
        response_ids: TensorType["batch", "time"],
        response_mask: TensorType["batch", "time", bool],
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> Scores:
        """log π(y_t | x, y_<t) at the sampling temperature, and V(x, y_<t), for every response position.

        Columns beyond `response_mask` hold finite numbers without meaning. Logits are taken to float32 before the
        softmax; no (batch, time, vocab) tensor outlives the call. Raises ValueError unless temperature > 0.
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        to_inputs = encoder_decoder_inputs if self.is_encoder_decoder else causal_inputs
        inputs, predicting = to_inputs(query_ids, query_mask, response_ids, response_mask, self.language_model.config)
        keep = {} if self.is_encoder_decoder else {"logits_to_keep": predicting}
        with self.autocast():
            output = self.language_model(**inputs, **keep, output_hidden_states=True, use_cache=False)
            states = self.critic_states(output, inputs, predicting, query_mask)
        logits = output.logits.float()
        if temperature != 1:  # a pass over a whole vocabulary of numbers
            logits = logits / temperature
        entropy = token_entropy(logits) if with_entropy else None
        values = self.value_head(states.float())[..., 0].expand(response_ids.shape)
        return Scores(token_logprobs(logits, response_ids), values, entropy)

    def critic_states(self, output, inputs: dict, predicting, query_mask) -> torch.Tensor:
        """What the value head reads: (batch, time, width), or (batch, 1, width) where the prompt alone is valued."""
        if self.critic_kind == "encoder":
            states = self.critic(input_ids=inputs["input_ids"], attention_mask=query_mask.long()).last_hidden_state
            weights = query_mask / query_mask.sum(1, keepdim=True)  # the mean over the prompt's real tokens
            return weights[:, None].to(states.dtype) @ states
        if self.critic_kind == "separate":
            return self.critic(**inputs, use_cache=False).last_hidden_state[:, predicting]
        states = output.decoder_hidden_states if self.is_encoder_decoder else output.hidden_states
        return states[-1][:, predicting]

    forward = score  # what a wrapper such as DistributedDataParallel calls


def causal_inputs(query_ids, query_mask, response_ids, response_mask, config) -> tuple[dict, torch.Tensor]:
    """The one sequence that a causal model reads, and at which of its positions the response is predicted.

    The one place where tokens and outputs are shifted: the output at index i has read tokens 0..i and predicts token
    i + 1, so response token t, which stands at index Q + t, is predicted at Q + t - 1, and nothing reads the last one.
    Left padding needs explicit positions: GPT-2 would count the padding.
    """
    mask = torch.cat([query_mask, response_mask[:, :-1]], dim=1)
    predicting = query_ids.shape[1] - 1 + torch.arange(response_ids.shape[1], device=mask.device)
    ids = torch.cat([query_ids, response_ids[:, :-1]], dim=1)
    return {"input_ids": ids, "attention_mask": mask.long(), "position_ids": position_ids(mask)}, predicting


def encoder_decoder_inputs(query_ids, query_mask, response_ids, response_mask, config) -> tuple[dict, slice]:
    """What encoder and decoder read; the decoder reads start, y_0, ..., y_{T-2}, so every position predicts.

    No decoder mask: a causal decoder never sees the padding on the right, and the start token, which T5 shares with
    padding, must not be hidden from it.
    """
    start = torch.full_like(response_ids[:, :1], config.decoder_start_token_id)
    decoder_ids = torch.cat([start, response_ids[:, :-1]], dim=1)
    inputs = {"input_ids": query_ids, "attention_mask": query_mask.long(), "decoder_input_ids": decoder_ids}
    return inputs, slice(None)


def length_groups(lengths: list[int], most_rows: int) -> list[list[int]]:
    """Rows, by their number, that share a forward pass: at most most_rows of them, of like response length.

    While cutting the shorter half of a pass to its own longest row saves PASS_TOKENS, that half gets its own pass.
    """

    def divide(rows: list[int]) -> list[list[int]]:
        half = len(rows) // 2
        if half * (lengths[rows[-1]] - lengths[rows[half - 1]]) < PASS_TOKENS:
            return [rows]
        return divide(rows[:half]) + divide(rows[half:])

    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [rows for start in range(0, len(order), most_rows) for rows in divide(order[start : start + most_rows])]


@torch.no_grad()
def score_rows(
    policy: PolicyModel,
    query_ids: TensorType["batch", "query"],
    query_mask: TensorType["batch", "query", bool],
    response_ids: TensorType["batch", "time"],
    response_mask: TensorType["batch", "time", bool],
    mini_batch_size: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> Scores:
    """`score` without gradient, in passes as `length_groups` forms them."""
    scores = Scores(*(torch.zeros(response_mask.shape, device=response_mask.device) for _ in Scores._fields))
    lengths = response_mask.sum(1).tolist()
    for rows in length_groups(lengths, mini_batch_size):
        real = slice(lengths[rows[-1]])
        batch = query_ids[rows], query_mask[rows], response_ids[rows, real], response_mask[rows, real]
        for whole, part in zip(scores, policy(*batch, temperature, with_entropy), strict=True):
            if part is not None:
                whole[rows, real] = part
    return scores


def position_ids(mask: TensorType["batch", "sequence", bool]) -> TensorType["batch", "sequence"]:
    """Positions that count real tokens only: 0, 1, 2, ... from the first one, and 0 on the padding before it."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def frozen_copy(policy: PolicyModel) -> PolicyModel:
    """The reference ρ: the language model as it is now, without critic or gradient, in eval mode for good.

    Modules with nothing to train are shared, not copied: under LoRA the reference is a copy of the adapter on the very
    same base weights. Everything that trains is copied, so that no update can reach it.
    """
    modules = policy.language_model.modules()
    shared = {id(module): module for module in modules if {p.requires_grad for p in module.parameters()} == {False}}
    reference = PolicyModel(copy.deepcopy(policy.language_model, shared), mixed_precision=policy.mixed_precision)
    return reference.requires_grad_(False).eval()
