"""Small random models of every family, made from their configurations, and plain oracles that read them.

The weights are drawn far apart, so that next-token distributions are far from uniform and a wrong position, shift or
mask moves log-probabilities by tenths of a nat. The seeds are such that greedy responses have several tokens and
sampled ones end after one token, after twelve, and in between. No configuration has dropout; nothing is downloaded.
"""

from string import ascii_letters

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from model import PolicyModel

VOCAB, PAD, EOS = 11, 0, 1
ENDS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = ("gpt2", "llama", "t5")
GPT2_SIZE = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "pad_token_id": PAD}


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw every weight anew: matrices with a spread of 1.5 / sqrt(width), biases and norms a little off theirs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def tiny_gpt2(seed: int = 6, **settings) -> PreTrainedModel:
    defaults = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    defaults |= {"activation_function": "gelu_pytorch_tanh"}  # the name that loading gives to gelu_new
    return randomise(GPT2LMHeadModel(GPT2Config(**(defaults | NO_DROPOUT | ENDS | settings))), seed)


def tiny_t5(seed: int = 11, **settings) -> PreTrainedModel:
    size = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = T5Config(**(size | ENDS | {"decoder_start_token_id": PAD, "dropout_rate": 0.0} | settings))
    model = randomise(T5ForConditionalGeneration(config), seed)
    with torch.no_grad():
        model.shared.weight.mul_(4)  # tied to the output layer, whose input T5 divides by sqrt(d_model)
        for name, parameter in model.named_parameters():
            if name.endswith("q.weight"):
                parameter.div_(4)  # as in T5's own initialisation: it does not divide by sqrt(d_kv)
    return model


ROTARY = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2} | ENDS
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}


def tiny_llama(seed: int = 1, **settings) -> PreTrainedModel:
    return randomise(LlamaForCausalLM(LlamaConfig(**(ROTARY | HEADS | settings))), seed)


def tiny_neox(seed: int = 0) -> PreTrainedModel:
    return randomise(GPTNeoXForCausalLM(GPTNeoXConfig(**ROTARY, num_attention_heads=2)), seed)


def tiny_gemma2(seed: int = 0) -> PreTrainedModel:
    """Its logits are capped softly, at plus and minus 2 here."""
    config = Gemma2Config(**ROTARY, **HEADS, final_logit_softcapping=2.0, attn_logit_softcapping=5.0)
    return randomise(Gemma2ForCausalLM(config), seed)


def tiny_granite(seed: int = 0) -> PreTrainedModel:
    """Its logits are divided by `logits_scaling`."""
    heads = {name: value for name, value in HEADS.items() if name != "head_dim"}
    return randomise(GraniteForCausalLM(GraniteConfig(**ROTARY, **heads, logits_scaling=3.0)), seed)


BUILDERS = {
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "t5": tiny_t5,
    "neox": tiny_neox,
    "gemma2": tiny_gemma2,
    "granite": tiny_granite,
}


def tiny_policy(family: str, **settings) -> PolicyModel:
    """A policy whose value head is random too: with the zero head it starts with, every value would be 0."""
    policy = PolicyModel(BUILDERS[family](**settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        policy.value_head.weight.copy_(0.3 * torch.randn(1, policy.value_head.in_features, generator=generator))
        policy.value_head.bias.fill_(0.3)
    return policy


def letter_tokenizer(vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """Ids 2, 3, 4, ... are the letters a, b, c, ...; 0 is the padding and 1 the end, both silent when decoded."""
    vocab = {"<pad>": PAD, "<eos>": EOS} | {letter: i + 2 for i, letter in enumerate(ascii_letters[: vocab_size - 2])}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


@torch.no_grad()
def next_token(policy: PolicyModel, query: list[int], before: list[int]) -> tuple[torch.Tensor, float]:
    """Logits of the token that follows query + before, and the value of that state: one row, no padding, no cache."""
    if policy.is_encoder_decoder:
        start = policy.language_model.config.decoder_start_token_id
        inputs = {"input_ids": torch.tensor([query]), "decoder_input_ids": torch.tensor([[start, *before]])}
    else:
        inputs = {"input_ids": torch.tensor([query + before])}
    output = policy.language_model(**inputs, output_hidden_states=True, use_cache=False)
    states = output.decoder_hidden_states if policy.is_encoder_decoder else output.hidden_states
    value = states[-1][0, -1].float() @ policy.value_head.weight[0] + policy.value_head.bias[0]
    return output.logits[0, -1].float(), value.item()


def brute_force(policy: PolicyModel, query: list[int], response: list[int], temperature: float) -> list[list[float]]:
    """Log-probability, value and entropy of each response token, one token at a time: three lists."""
    logprobs, values, entropies = [], [], []
    for t, token in enumerate(response):
        logits, value = next_token(policy, query, response[:t])
        distribution = (logits.double() / temperature).log_softmax(-1)
        logprobs.append(distribution[token].item())
        values.append(value)
        entropies.append(-sum(p * q for p, q in zip(distribution.exp().tolist(), distribution.tolist(), strict=True)))
    return [logprobs, values, entropies]
