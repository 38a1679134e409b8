"""Tokenizers and models: from ids, folders or, for the models trained here, from configurations."""

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from config import Config, UsageError, first_line
from model import PolicyModel

logging.set_verbosity_error()
logging.disable_progress_bar()
EOS, PAD = "<|endoftext|>", "<|pad|>"


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises UsageError for a device that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"--device {name} cannot be used here; expected auto, cpu or cuda") from None
    return device


def load(factory, flag: str, path: str, **settings):
    """`factory.from_pretrained(path)`, its many ways to fail told in one sentence that names the flag."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return factory.from_pretrained(path, **settings)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if "memory" in str(error):
            raise
        where = "a folder without a usable model" if Path(path).exists() else "no folder, and no reachable Hub model"
        raise UsageError(f"--{flag} {path} is {where}: {first_line(error)}") from None


def load_tokenizer(path: str, flag: str = "base_model_name") -> PreTrainedTokenizerBase:
    """A tokenizer that cuts long texts on the left and can pad: with its EOS where it has no pad token of its own."""
    tokenizer = load(AutoTokenizer, flag, path)
    tokenizer.truncation_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None or (flag == "base_model_name" and tokenizer.eos_token_id is None):
        raise UsageError(f"--{flag} {path}: its tokenizer has no end-of-sequence token, so no response could ever end")
    return tokenizer


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Set every dropout probability to 0: with dropout, the same tokens would score differently each time.

    In the configuration rather than in the modules, because T5 and Llama read some of theirs as plain numbers.
    """
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):  # a model of several, each with a configuration of its own
            without_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def load_language_model(path: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """A causal or an encoder-decoder language model, in the given dtype rather than the one it was stored in."""
    config = without_dropout(load(AutoConfig, "base_model_name", path))
    factory = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return load(factory, "base_model_name", path, config=config, dtype=getattr(torch, dtype)).to(device)


def load_policy(path: str, dtype: str, device: torch.device, gradient_checkpointing: bool = False) -> PolicyModel:
    """A policy from a language model, with the value head that a run saved beside it, or a new one that is zero."""
    policy = PolicyModel(load_language_model(path, dtype, device))
    value_head = Path(path) / "value_head.safetensors"
    if value_head.exists():
        try:
            policy.value_head.load_state_dict(load_file(value_head, device=str(device)))
        except (SafetensorError, RuntimeError) as error:
            raise UsageError(f"{value_head} is no value head of this model: {first_line(error)}") from None
    if gradient_checkpointing:
        policy.language_model.activation_checkpointing_enable({"use_reentrant": False})
    return policy


def save_policy(policy: PolicyModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The language model and tokenizer in Hugging Face format, loadable without this project, and the value head."""
    policy.language_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    head = {name: tensor.contiguous().cpu() for name, tensor in policy.value_head.state_dict().items()}
    save_file(head, folder / "value_head.safetensors")


def context_length(config: PretrainedConfig) -> int:
    """The most tokens a model can read at once; the relative positions of T5 and its kin have no limit."""
    if hasattr(config, "relative_attention_num_buckets"):
        return 10**9
    for name in ("n_positions", "max_position_embeddings"):
        if getattr(config, name, None):
            # RoBERTa's positions start behind its padding index
            return getattr(config, name) - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)
    return 10**9


def check_context(config: Config, policy: PolicyModel) -> None:
    """Raise UsageError if prompt and response, together or in encoder and decoder, may not fit the model's context."""
    context = context_length(policy.language_model.config)
    prompt, response = config.max_prompt_length, config.max_new_tokens
    if policy.is_encoder_decoder and max(prompt, response) > context:
        raise UsageError(
            f"--max_prompt_length {prompt} or --max_new_tokens {response} is more than the {context} tokens that "
            "the model's encoder and decoder can each read"
        )
    if not policy.is_encoder_decoder and prompt + response > context:
        raise UsageError(
            f"--max_prompt_length {prompt} plus --max_new_tokens {response} is more than the {context} tokens the "
            f"model can read; at most {max(context - response, 1)} tokens of prompt are left beside such a response"
        )


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
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, in one kernel
        initializer_range=0.02 * (768 / config.n_embd) ** 0.5,  # GPT-2's is for a width of 768
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(without_dropout(model_config))
