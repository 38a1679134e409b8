"""Tokenizers and models: from ids or folders, and saved again in formats that need none of this project."""

import copy
import functools
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from checkpoint import whole_folder, write_manifest
from config import Config, UsageError, first_line
from model import PolicyModel, frozen_copy

logging.set_verbosity_error()
logging.disable_progress_bar()
logging.get_logger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="transformers|peft|bitsandbytes|huggingface_hub")


@functools.cache
def hub_error() -> str:
    """Why the Hub cannot be reached, asked as the library asks, if it cannot: then its cache alone is read, at once."""
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # whatever the library's HTTP client raises
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} cannot be reached ({first_line(error)})"
    return ""


@contextmanager
def one_sentence(problem: str) -> Iterator[None]:
    """Turn what a library raises in the block into a UsageError that begins with the problem, unless memory ran out."""
    try:
        yield
    except Exception as error:  # a damaged file can raise anything
        if isinstance(error, MemoryError) or "tried to allocate" in str(error).lower():
            raise
        text = str(error).replace(":\n\t", ": ")  # torch begins a list below
        reason = first_line(Exception(text or type(error).__name__))
        raise UsageError(f"{problem}: {reason}") from None


def load(from_pretrained: Callable, flag: str, path: str, **settings):
    """`from_pretrained(path)`, its many ways to fail told in one sentence that names the flag."""
    if Path(path).exists():
        problem = "a folder without a usable model"
    else:
        reason = hub_error() or "no reachable Hub model"
        problem = f"no folder, and {reason}"
    with one_sentence(f"--{flag} {path} is {problem}"):
        return from_pretrained(path, **settings)


def base_of(path: str) -> str:
    """Where the whole model is: at the path itself, or where an adapter that is saved there says."""
    adapter = Path(path) / "adapter_config.json"
    if not adapter.exists():
        return path
    with one_sentence(f"{adapter} cannot be read"):
        return json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"] or path


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, path: str, flag: str) -> None:
    """Raise UsageError if the tokenizer has ids that the model beside it, or under the adapter beside it, lacks."""
    base = base_of(path)
    base_flag = flag if base == path else "base_model_name"
    config = load(transformers.AutoConfig.from_pretrained, base_flag, base)
    n_ids = max(tokenizer.get_vocab().values()) + 1
    n_embedded = getattr(config, "vocab_size", n_ids)
    if n_ids > n_embedded:
        raise UsageError(f"--{flag} {path}: its tokenizer has {n_ids} tokens, its model embeds {n_embedded}")


def load_tokenizer(path: str, flag: str = "base_model_name") -> PreTrainedTokenizerBase:
    """A tokenizer that cuts long texts on the left and can pad: with its EOS where it has no pad token of its own."""
    tokenizer = load(transformers.AutoTokenizer.from_pretrained, flag, path)
    tokenizer.truncation_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    needs_eos = flag != "reward_model_path"
    if tokenizer.pad_token_id is None or (needs_eos and tokenizer.eos_token_id is None):
        raise UsageError(f"--{flag} {path}: its tokenizer has no end-of-sequence token, so no response could ever end")
    check_vocabulary(tokenizer, path, flag)
    return tokenizer


def prepare_config(config: PretrainedConfig) -> PretrainedConfig:
    """Set every dropout probability to 0: with dropout, the same tokens would score differently each time.

    In the configuration rather than in the modules, because T5 and Llama read some of theirs as plain numbers. GPT-2's
    and Flan-T5's activation gets its other name in transformers: the same function in one kernel, not eight.
    """
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):  # a model of several, each with a configuration of its own
            prepare_config(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
        elif value == "gelu_new":
            setattr(config, name, "gelu_pytorch_tanh")
    return config


def thin_gradient(language_model: PreTrainedModel) -> None:
    """Where the input embedding is the output layer too, let its gradient be the rows read, not a matrix of zeros but
    for them: the output layer's, to which it is added, is a full one. For a model that is trained whole, in one
    process: fused Adam takes no gradient that is sparse in the end, DistributedDataParallel none from such a module.
    """
    output_layer = language_model.get_output_embeddings()
    if output_layer is None:
        return
    for module in language_model.modules():
        if isinstance(module, torch.nn.Embedding) and module.weight is output_layer.weight:
            module.sparse = language_model.device.type == "cpu"  # where it was measured


def quantized(device: torch.device, in_8bit: bool, in_4bit: bool = False) -> dict:
    """The settings that load weights in 8 or 4 bits. Raises UsageError if bitsandbytes is not installed."""
    if not (in_8bit or in_4bit):
        return {}
    if not importlib.util.find_spec("bitsandbytes"):
        raise UsageError("loading in 8 or 4 bits needs bitsandbytes: pip install bitsandbytes")
    settings = transformers.BitsAndBytesConfig(load_in_8bit=in_8bit, load_in_4bit=in_4bit, bnb_4bit_quant_type="nf4")
    return {"quantization_config": settings, "device_map": {"": device}}


def load_language_model(
    path: str, dtype: str, device: torch.device, in_8bit: bool = False, in_4bit: bool = False
) -> PreTrainedModel:
    """A causal or an encoder-decoder language model, in the given dtype rather than the one it was stored in."""
    settings = quantized(device, in_8bit, in_4bit)
    config = prepare_config(load(transformers.AutoConfig.from_pretrained, "base_model_name", path))
    factory = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    settings["config"] = config
    settings["dtype"] = getattr(torch, dtype)
    model = load(factory.from_pretrained, "base_model_name", path, **settings)
    if not (in_8bit or in_4bit):
        return model.to(device)
    for module in model.modules():  # else bitsandbytes repacks 4-bit weights for AVX-512, and the gradient is lost
        module.support_avx512bf16_for_cpu = False
    return model


def adapter_settings(path: str, base: str, name: str):
    """peft's settings of the adapter at `path`. Raises UsageError unless it is whole and one of the model `base`, which
    may also be called by its own `name`.
    """
    import peft

    if Path(path).exists() and len(list(Path(path).glob("adapter_*"))) < 2:  # peft would ask the Hub for the other
        raise UsageError(f"--peft_model_path {path} lacks adapter_config.json or adapter_model.safetensors")
    settings = prepare_config(load(peft.PeftConfig.from_pretrained, "peft_model_path", path))
    settings.inference_mode = False
    own = settings.base_model_name_or_path or base
    if Path(own).name not in (Path(base).name, Path(name).name):
        raise UsageError(
            f"--peft_model_path {path} is an adapter of {own}, not of {base}; "
            f"if they are the same model, name it alike in {path}/adapter_config.json"
        )
    return settings


def with_adapter(language_model: PreTrainedModel, config: Config, path: str) -> PreTrainedModel:
    """The model under LoRA: under the adapter at `path`, or a new one of rank --lora_r, which changes nothing yet.

    The adapter alone is trained, in float32 whatever the base weights are in, and has no dropout. Raises UsageError for
    an adapter of another model.
    """
    if not (path or config.lora_r):
        return language_model
    with one_sentence("--lora_r and --peft_model_path need peft, pip install peft"):
        import peft
    base = config.base_model_name or language_model.name_or_path
    if path:
        settings = adapter_settings(path, base, language_model.name_or_path)
        problem = f"--peft_model_path {path} is an adapter of {settings.base_model_name_or_path or base}, not of {base}"
    else:
        task = "SEQ_2_SEQ_LM" if language_model.config.is_encoder_decoder else "CAUSAL_LM"
        settings = peft.LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, task_type=task)
        problem = f"--lora_r {config.lora_r} finds no place in {base}"
    with one_sentence(problem):
        adapted = peft.get_peft_model(language_model, settings)
        if path:
            result = adapted.load_adapter(path, "default", is_trainable=True)
            if result.missing_keys or result.unexpected_keys:
                raise ValueError("it has weights for other layers")
    return adapted


def load_critic(config: Config, run: str, base_model: str, device: torch.device) -> PreTrainedModel | None:
    """The critic's own trunk: the one that a run saved, or a copy of the base model's; None for a shared one."""
    if config.critic == "shared":
        return None
    saved = Path(run) / "critic"
    path = str(saved) if saved.exists() else base_model
    factory = transformers.AutoModel if config.critic == "separate" else transformers.AutoModelForTextEncoding
    critic_config = prepare_config(load(transformers.AutoConfig.from_pretrained, "base_model_name", path))
    critic = load(factory.from_pretrained, "base_model_name", path, config=critic_config, dtype=torch.float32)
    return critic.to(device)


def load_policy(config: Config, path: str, device: torch.device) -> PolicyModel:
    """A policy from a model, or from a run's folder with the adapter, critic and value head that it holds.

    What is not there is new: an adapter that changes nothing, a critic from the base model, a value head of zeros.
    """
    base = base_of(path)
    adapter = config.peft_model_path if base == path else path
    language_model = load_language_model(base, config.dtype, device, config.load_in_8bit, config.load_in_4bit)
    if not (config.has_adapter or adapter):
        thin_gradient(language_model)
    critic = load_critic(config, path, base, device)
    policy = PolicyModel(
        with_adapter(language_model, config, adapter),
        critic=critic,
        critic_kind=config.critic,
        mixed_precision=config.mixed_precision == "bf16",
    )
    value_head = Path(path) / "value_head.safetensors"
    if value_head.exists():
        with one_sentence(f"{value_head} is no value head of this model"):
            policy.value_head.load_state_dict(load_file(value_head, device=str(device)))
    if config.gradient_checkpointing:
        policy.language_model.activation_checkpointing_enable({"use_reentrant": False})
    return policy


def load_reference(config: Config, path: str, policy: PolicyModel) -> PolicyModel:
    """The frozen reference: a copy of the policy as it starts, or with --reference_in_8bit its base model in 8 bits."""
    if not config.reference_in_8bit:
        return frozen_copy(policy)
    device = policy.value_head.weight.device
    base_model = load_language_model(path, config.dtype, device, in_8bit=True)
    reference = PolicyModel(with_adapter(base_model, config, config.peft_model_path))
    return reference.requires_grad_(False).eval()


def save_policy(
    policy: PolicyModel, tokenizer: PreTrainedTokenizerBase, folder: Path, merge: bool = False, replaces: str = ""
) -> None:
    """The language model, or its adapter alone, and the tokenizer in the formats of transformers and peft, loadable
    without this project; value head and critic beside them; and a manifest that says what is there.

    With `merge`, an adapter is folded into a copy of the whole model. `replaces` as in `whole_folder`.
    """
    language_model = policy.language_model
    if merge and hasattr(language_model, "merge_and_unload"):
        language_model = copy.deepcopy(language_model).merge_and_unload()
    with whole_folder(folder, replaces) as scratch:
        language_model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        if policy.critic is not None:
            policy.critic.save_pretrained(scratch / "critic")
        head = {name: tensor.contiguous().cpu() for name, tensor in policy.value_head.state_dict().items()}
        save_file(head, scratch / "value_head.safetensors")
        factory = "AutoModelForSeq2SeqLM" if policy.is_encoder_decoder else "AutoModelForCausalLM"
        write_manifest(scratch, f"transformers.{factory}.from_pretrained({{}})", base_of(str(scratch)))


def context_length(config: PretrainedConfig) -> int:
    """The most tokens a model can read at once; the relative positions of T5 and its kin have no limit."""
    has_relative_positions = hasattr(config, "relative_attention_num_buckets")
    limit = getattr(config, "n_positions", None) or getattr(config, "max_position_embeddings", None)
    if has_relative_positions or not limit:
        return 10**9
    if "roberta" in config.model_type:
        return limit - (config.pad_token_id + 1)  # its positions start behind its padding index
    return limit
