"""What is trained: the policy with its value head, and the frozen reference that it is held to.

Both families of language models answer one question, `score`: given prompts and responses, how probable was each
response token, and what was the state before it worth? After that call nothing knows which family it was.

    causal (GPT-2, Llama):  pad pad x x x │ y0 y1 y2 eos     one sequence; the output at a token predicts the next
    encoder-decoder (T5):   x x x pad pad → start y0 y1 y2   the encoder reads x, the decoder predicts y0 y1 y2 eos
"""

import copy
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torchtyping import TensorType, is_float
from transformers import PreTrainedModel

from probe import undrawable_ids

PASS_TOKENS = 128  # one more pass reads all weights again: about the cost of so many tokens, as measured on a CPU


class TokenOutputs(NamedTuple):
    """Per response token: log-probability in nats, value in reward units, and entropy in nats where asked for."""

    logprobs: TensorType["batch", "time", is_float]
    values: TensorType["batch", "time", is_float]
    entropy: TensorType["batch", "time", is_float] | None


class PolicyModel(nn.Module):
    """A language model, and a scalar value head on one of three critics: the policy π and its values V.

    shared    the head reads the policy's own trunk: V(x, y_<t), nearly free, but two losses pull on one trunk
    separate  it reads a trunk of the critic's own: V(x, y_<t), twice the work
    encoder   of an encoder-decoder: it reads the prompt alone: V(x), the same for every response token. An encoder that
              also read the response would see, at token t, the tokens after t, and its baseline would be biased.
              As no state after the prompt is valued, only λ = 1 leaves the policy gradient unbiased.

    The head starts at zero, so V = 0 until it has learned something, and its first loss leaves the trunk alone. It
    lives outside the language model, in `precision`, so that the latter saves and loads as if it were not there.
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
        self.undrawable = undrawable_ids(language_model)  # their probability is 0, in sampling and in scoring
        self.value_head = nn.Linear(self.state_width(), 1, device=self.device, dtype=self.precision)
        for parameter in self.value_head.parameters():
            nn.init.zeros_(parameter)

    @torch.no_grad()
    def state_width(self) -> int:
        """Of what the value head reads, seen on one token: configurations name it in several ways, some another width
        than that of the states that come out.
        """
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        _, states = self.read(query_ids=ids, query_mask=ids == 0, response_ids=ids, response_mask=ids == 0)
        return states.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.language_model.device

    @property
    def precision(self) -> torch.dtype:
        """Of what comes out: float32, whatever less the language model has, or float64 where that is what it has."""
        return torch.promote_types(self.language_model.dtype, torch.float32)

    @property
    def is_encoder_decoder(self) -> bool:
        return self.language_model.config.is_encoder_decoder

    def autocast(self) -> torch.autocast:
        """Where forward passes run: with `mixed_precision`, matrix products in bfloat16 on weights in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed_precision)

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
    ) -> TokenOutputs:
        """log π(y_t | x, y_<t) at the sampling temperature, and V(x, y_<t), for every response position.

        Columns beyond `response_mask` hold numbers without meaning, -inf among them. Logits are taken to `precision`
        before the softmax; no (batch, time, vocab) tensor outlives the call. Raises ValueError unless temperature > 0.
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        logits, states = self.read(
            query_ids=query_ids, query_mask=query_mask, response_ids=response_ids, response_mask=response_mask
        )
        logits = self.drawable(logits.to(self.precision))
        if temperature != 1:  # a pass over a whole vocabulary of numbers
            logits = logits / temperature
        return TokenOutputs(
            logprobs=thin_logprobs(logits, response_ids),
            values=self.value_head(states.to(self.precision))[..., 0].expand(response_ids.shape),
            entropy=thin_entropy(logits) if with_entropy else None,
        )

    def drawable(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits, with -inf for what cannot be drawn."""
        if not self.undrawable:
            return logits
        return logits.index_fill(-1, torch.tensor(self.undrawable, device=logits.device), float("-inf"))

    forward = score  # so that policy(...) is what wrappers of a module expect

    def read(
        self,
        query_ids: TensorType["batch", "query"],
        query_mask: TensorType["batch", "query", bool],
        response_ids: TensorType["batch", "time"],
        response_mask: TensorType["batch", "time", bool],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits that predict the response tokens, and what the value head reads: `critic_states`."""
        time = response_ids.shape[1]
        if self.is_encoder_decoder:
            start_id = self.language_model.config.decoder_start_token_id
            inputs = encoder_decoder_inputs(
                query_ids=query_ids, query_mask=query_mask, response_ids=response_ids, start_id=start_id
            )
            keep = {}  # the decoder reads nothing but the response
        else:
            inputs = causal_inputs(
                query_ids=query_ids, query_mask=query_mask, response_ids=response_ids, response_mask=response_mask
            )
            keep = {"logits_to_keep": time}
        with self.autocast():
            output = self.language_model(**inputs, **keep, output_hidden_states=True, use_cache=False)
            states = self.critic_states(output, inputs, query_mask, time)
        return output.logits, states

    def critic_states(
        self, output, inputs: dict[str, torch.Tensor], query_mask: TensorType["batch", "query", bool], time: int
    ) -> torch.Tensor:
        """What the value head reads: (batch, time, width), or (batch, 1, width) where the prompt alone is valued."""
        if self.critic_kind == "encoder":
            states = self.critic(input_ids=inputs["input_ids"], attention_mask=query_mask.long()).last_hidden_state
            weights = query_mask / query_mask.sum(1, keepdim=True)  # the mean over the prompt's real tokens
            return weights[:, None].to(states.dtype) @ states
        if self.critic_kind == "separate":
            return self.critic(**inputs, use_cache=False).last_hidden_state[:, -time:]
        layers = output.decoder_hidden_states if self.is_encoder_decoder else output.hidden_states
        return layers[-1][:, -time:]


def causal_inputs(
    query_ids: TensorType["batch", "query"],
    query_mask: TensorType["batch", "query", bool],
    response_ids: TensorType["batch", "time"],
    response_mask: TensorType["batch", "time", bool],
) -> dict[str, torch.Tensor]:
    """The one sequence that a causal model reads: the prompt, and the response but for its last token.

    Where tokens and outputs are shifted: the output at index i has read tokens 0..i and predicts token i + 1. Nothing
    reads the last response token, so the last `time` outputs are those that predict the response: `score` takes them.
    Left padding needs explicit positions: GPT-2 would count the padding.
    """
    ids = torch.cat([query_ids, response_ids[:, :-1]], dim=1)  # (batch, query + time - 1)
    mask = torch.cat([query_mask, response_mask[:, :-1]], dim=1)
    return {"input_ids": ids, "attention_mask": mask.long(), "position_ids": position_ids(mask)}


def encoder_decoder_inputs(
    query_ids: TensorType["batch", "query"],
    query_mask: TensorType["batch", "query", bool],
    response_ids: TensorType["batch", "time"],
    start_id: int,
) -> dict[str, torch.Tensor]:
    """What encoder and decoder read; the decoder's shift is its start token: start, y_0, ..., y_{T-2} all predict.

    No decoder mask: a causal decoder never sees the padding on the right, and the start token, which T5 shares with
    padding, must not be hidden from it.
    """
    start = torch.full_like(response_ids[:, :1], start_id)
    decoder_ids = torch.cat([start, response_ids[:, :-1]], dim=1)
    return {"input_ids": query_ids, "attention_mask": query_mask.long(), "decoder_input_ids": decoder_ids}


def position_ids(mask: TensorType["batch", "sequence", bool]) -> TensorType["batch", "sequence"]:
    """Positions that count real tokens only: 0, 1, 2, ... from the first one, and 0 on the padding before it."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


# --------------------------------------------------------------------------------------------------------------------
# ppo.py's token_logprobs and token_entropy in less memory: logits are by far the largest tensors of a pass. What stands
# from here to `score_in_passes` changes no number: memory and time, for a second reading.
# --------------------------------------------------------------------------------------------------------------------


class ThinLogprobs(torch.autograd.Function):
    """log softmax(z)[y]. Its gradient for z_a, 1[a = y] - softmax(z)_a, is written over the log-probabilities, where
    autograd by itself has three tensors as large as the logits.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logprobs = logits.log_softmax(-1)
        ctx.save_for_backward(logprobs, tokens)
        return logprobs.gather(-1, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        logprobs, tokens = ctx.saved_tensors
        return logprobs.exp_().mul_(-grad).scatter_add_(-1, tokens, grad), None


def thin_logprobs(
    logits: TensorType["batch", "time", "vocab", is_float], tokens: TensorType["batch", "time"]
) -> TensorType["batch", "time", is_float]:
    """`ppo.token_logprobs`, with a gradient that can be taken once."""
    return ThinLogprobs.apply(logits, tokens[..., None])[..., 0]


def thin_entropy(logits: TensorType["batch", "time", "vocab", is_float]) -> TensorType["batch", "time", is_float]:
    """`ppo.token_entropy`, a row at a time: without gradient, no other tensor is as large as the logits."""
    rows = []
    for row in logits:
        finite = row.clamp(min=torch.finfo(row.dtype).min / 2)
        logprobs = finite.log_softmax(-1)  # (time, vocab)
        rows.append(-(logprobs.exp() * logprobs).sum(-1))
    return torch.stack(rows)


# --------------------------------------------------------------------------------------------------------------------
# Many rows, in forward passes of few
# --------------------------------------------------------------------------------------------------------------------


def length_groups(lengths: list[int], most_rows: int) -> list[list[int]]:
    """The numbers of the rows that share a forward pass: at most most_rows of them, of like response length."""
    by_length = sorted(range(len(lengths)), key=lambda row: lengths[row])
    groups = []
    for start in range(0, len(by_length), most_rows):
        groups += halve_where_cheaper(by_length[start : start + most_rows], lengths)
    return groups


def halve_where_cheaper(rows: list[int], lengths: list[int]) -> list[list[int]]:
    """The rows, from short to long, as one group; or as several, while a pass of its own saves PASS_TOKENS of padding.

    A shorter half in the same pass as the longer one is padded to the longest row of both.
    """
    half = len(rows) // 2
    shorter, longer = rows[:half], rows[half:]
    if not shorter:
        return [rows]
    padding_saved = half * (lengths[longer[-1]] - lengths[shorter[-1]])
    if padding_saved < PASS_TOKENS:
        return [rows]
    return halve_where_cheaper(shorter, lengths) + halve_where_cheaper(longer, lengths)


@contextmanager
def eval_mode(policy: PolicyModel):
    """Eval mode for a while: in train mode, activation checkpointing would silently drop the key/value cache."""
    was_training = policy.training
    try:
        policy.eval()
        yield
    finally:
        policy.train(was_training)


@torch.no_grad()
def score_in_passes(
    policy: PolicyModel,
    query_ids: TensorType["batch", "query"],
    query_mask: TensorType["batch", "query", bool],
    response_ids: TensorType["batch", "time"],
    response_mask: TensorType["batch", "time", bool],
    mini_batch_size: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> TokenOutputs:
    """`score` without gradient, in passes as `length_groups` forms them; 0 beyond a pass's longest response."""
    logprobs = torch.zeros(response_mask.shape, device=response_mask.device, dtype=policy.precision)
    values = torch.zeros_like(logprobs)
    entropy = torch.zeros_like(logprobs) if with_entropy else None
    lengths = response_mask.sum(1).tolist()
    for rows in length_groups(lengths, mini_batch_size):
        longest = lengths[rows[-1]]
        with eval_mode(policy):
            outputs = policy(
                query_ids=query_ids[rows],
                query_mask=query_mask[rows],
                response_ids=response_ids[rows, :longest],
                response_mask=response_mask[rows, :longest],
                temperature=temperature,
                with_entropy=with_entropy,
            )
        logprobs[rows, :longest] = outputs.logprobs
        values[rows, :longest] = outputs.values
        if with_entropy:
            entropy[rows, :longest] = outputs.entropy
    return TokenOutputs(logprobs=logprobs, values=values, entropy=entropy)


def frozen_copy(policy: PolicyModel) -> PolicyModel:
    """The reference ρ: the language model as it is now, without critic or gradient, in eval mode for good.

    Modules with nothing to train are shared, not copied: under LoRA the reference is a copy of the adapter on the very
    same base weights. Everything that trains is copied, so that no update can reach it.
    """
    # deepcopy takes whatever its second argument holds under an object's id for the copy of that object
    copies = {id(module): module for module in policy.language_model.modules() if is_frozen(module)}
    language_model = copy.deepcopy(policy.language_model, copies)
    reference = PolicyModel(language_model, mixed_precision=policy.mixed_precision)
    return reference.requires_grad_(False).eval()


def is_frozen(module: nn.Module) -> bool:
    """Whether the module has parameters and none of them is trained."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
