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


class Scores(NamedTuple):
    """Per response token: log-probability in nats, value in reward units, and entropy in nats where asked for."""

    logprobs: TensorType["batch", "time", is_float]
    values: TensorType["batch", "time", is_float]
    entropy: TensorType["batch", "time", is_float] | None


class PolicyModel(nn.Module):
    """A language model with a scalar value head on its trunk: the policy and its critic, sharing all but the heads.

    The head starts at zero, so V = 0 until it has learned something, and its first loss leaves the trunk alone. It
    lives outside the language model, in float32, so that the latter saves and loads as if it were not there.
    """

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model
        self.value_head = nn.Linear(language_model.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.to(language_model.device)

    @property
    def is_encoder_decoder(self) -> bool:
        return self.language_model.config.is_encoder_decoder

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
        run = self._run_encoder_decoder if self.is_encoder_decoder else self._run_causal
        logits, hidden = run(query_ids, query_mask, response_ids, response_mask)
        logits = logits.float() / temperature
        entropy = token_entropy(logits) if with_entropy else None
        values = self.value_head(hidden.float())[..., 0]
        return Scores(token_logprobs(logits, response_ids), values, entropy)

    forward = score  # what a wrapper such as DistributedDataParallel calls

    def _run_causal(self, query_ids, query_mask, response_ids, response_mask):
        """Logits and hidden states that predict the response: the one place where tokens and outputs are shifted.

        The output at index i has read tokens 0..i and predicts token i + 1, so response token t, which stands at
        index Q + t, is predicted at Q + t - 1. Left padding needs explicit positions: GPT-2 would count the padding.
        """
        ids = torch.cat([query_ids, response_ids], dim=1)
        mask = torch.cat([query_mask, response_mask], dim=1)
        first = query_ids.shape[1] - 1
        predicting = torch.arange(first, first + response_ids.shape[1], device=ids.device)
        output = self.language_model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=position_ids(mask),
            logits_to_keep=predicting,
            output_hidden_states=True,
            use_cache=False,
        )
        return output.logits, output.hidden_states[-1][:, predicting]

    def _run_encoder_decoder(self, query_ids, query_mask, response_ids, response_mask):
        """Logits and decoder states that predict the response: the decoder reads start, y_0, ..., y_{T-2}.

        No decoder mask: a causal decoder never sees the padding on the right, and the start token, which T5 shares
        with padding, must not be hidden from it.
        """
        start = torch.full_like(response_ids[:, :1], self.language_model.config.decoder_start_token_id)
        output = self.language_model(
            input_ids=query_ids,
            attention_mask=query_mask.long(),
            decoder_input_ids=torch.cat([start, response_ids[:, :-1]], dim=1),
            output_hidden_states=True,
            use_cache=False,
        )
        return output.logits, output.decoder_hidden_states[-1]


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
    """`score` without gradient, in passes of mini_batch_size rows of like length, so that little of them is padding."""
    scores = Scores(*(torch.zeros(response_mask.shape, device=response_mask.device) for _ in Scores._fields))
    lengths = response_mask.sum(1)
    for rows in lengths.argsort(stable=True).split(mini_batch_size):
        real = slice(int(lengths[rows].max()))
        batch = query_ids[rows], query_mask[rows], response_ids[rows, real], response_mask[rows, real]
        for whole, part in zip(scores, policy(*batch, temperature, with_entropy), strict=True):
            if part is not None:
                whole[rows, real] = part
    return scores


def position_ids(mask: TensorType["batch", "sequence", bool]) -> TensorType["batch", "sequence"]:
    """Positions that count real tokens only: 0, 1, 2, ... from the first one, and 0 on the padding before it."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def first_inputs(language_model: PreTrainedModel, query_ids: torch.Tensor, query_mask: torch.Tensor) -> dict:
    """The arguments of the first forward pass: the whole prompt, or the encoded prompt and the start token."""
    attention_mask = query_mask.long()
    if language_model.config.is_encoder_decoder:
        encoded = language_model.get_encoder()(input_ids=query_ids, attention_mask=attention_mask)
        start = torch.full_like(query_ids[:, :1], language_model.config.decoder_start_token_id)
        return {"decoder_input_ids": start, "encoder_outputs": encoded, "attention_mask": attention_mask}
    positions = position_ids(query_mask)
    return {"input_ids": query_ids, "attention_mask": attention_mask, "position_ids": positions, "logits_to_keep": 1}


def next_inputs(inputs: dict, tokens: TensorType["batch"], cache) -> dict:
    """The arguments of the next forward pass: the token just drawn, behind what the cache remembers."""
    if "decoder_input_ids" in inputs:
        return inputs | {"decoder_input_ids": tokens[:, None], "past_key_values": cache}
    mask = inputs["attention_mask"]
    return inputs | {
        "input_ids": tokens[:, None],
        "attention_mask": torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1),
        "position_ids": inputs["position_ids"][:, -1:] + 1,
        "past_key_values": cache,
    }


def select_inputs(inputs: dict, keep: TensorType["batch", bool]) -> dict:
    """Drop the rows that have ended from everything that the next forward pass reads, the cache included."""
    inputs["past_key_values"].batch_select_indices(keep.nonzero()[:, 0])
    kept = {name: value[keep] for name, value in inputs.items() if torch.is_tensor(value)}
    if "encoder_outputs" in inputs:
        encoded = inputs["encoder_outputs"]
        kept["encoder_outputs"] = type(encoded)(last_hidden_state=encoded.last_hidden_state[keep])
    return inputs | kept


def frozen_copy(policy: PolicyModel) -> PolicyModel:
    """The reference ρ: a copy that shares no storage with the policy, without gradients, in eval mode for good."""
    return copy.deepcopy(policy).requires_grad_(False).eval()
