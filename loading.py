"""Tokenizers and models: from ids or folders, and saved again in formats that need none of this project."""

import copy
import math
import os
import types
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from adapters import adapter_to_add, base_of, merged, new_adapter, new_parts, with_adapter, with_its_adapter
from config import Config, UsageError
from distributed import size
from files import read_object, whole_folder
from folders import write_manifest, write_settings
from hub import check_installed, has_file, load, one_sentence, own_settings, pickle_refused, prepare_config
from model import PolicyModel, frozen_copy
from probe import difference, is_exact, read_in_three_ways, special_ends
from progress import tell
from trust import check_names

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
OLD_CONSTANTS = ("attn.bias", "masked_bias", "position_ids", "inv_freq", "causal_mask", "version")  # once saved, too


def named_weights(settings: dict) -> list:
    """The files of weights that an index of them or a model's configuration names."""
    shards, whole = settings.get("weight_map"), settings.get("transformers_weights")
    return [*(shards.values() if isinstance(shards, dict) else ()), *([whole] if whole is not None else [])]


def check_weight_files(path: str, flag: str, allow_pickle: bool) -> None:
    """Raise UsageError where files of the model at `path` name weights elsewhere, where these are in a pickle that is
    not allowed, or where transformers would put an adapter on it that nobody asked for.
    """
    if has_file(path, "adapter_config.json"):
        raise UsageError(f"--{flag} {path} holds an adapter of another model, expected a whole model")
    files = ["config.json", *INDEXES]
    for file in files:
        names = named_weights(own_settings(path, file))
        check_names(names, f"--{flag} {path}: its {file}")
        files += [name for name in names if name.endswith(".index.json") and name not in files]
        pickles = [name for name in names if not name.endswith((".safetensors", ".safetensors.index.json"))]
        if pickles and not allow_pickle and file != INDEXES[1]:
            raise pickle_refused(flag, path, pickles[0])
    pickles = sorted(Path(path).glob("pytorch_model*.bin*"))
    has_others = any((Path(path) / name).exists() for name in ("model.safetensors", INDEXES[0]))
    if pickles and not allow_pickle and not has_others:
        raise pickle_refused(flag, path, pickles[0].name)


def load_weights(
    factory: type,
    flag: str,
    path: str,
    is_new: bool = False,
    expected: str = "a whole model",
    allow_pickle: bool = False,
    **settings,
) -> PreTrainedModel:
    """The model at `path`, with every weight from its files: transformers fills in random numbers for what is not
    there, and leaves out what has no place, as with a configuration of another depth.

    Raises UsageError for weights that are missing or of another shape, and for those that a part of the model has no
    place for, and as `check_weight_files`. Files may have parts that the model lacks, as other heads have. With
    `is_new` the model's head and pooler are to be trained, and need not be there, or be alike.
    """
    check_weight_files(path, flag, allow_pickle)
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    settings |= {"use_safetensors": None if allow_pickle else True, "weights_only": True}
    settings["attn_implementation"] = None  # what a file names could be code on the Hub
    model, found = load(factory.from_pretrained, flag, path, **settings)

    trunk = f"{model.base_model_prefix}."

    def part(key: str) -> str:
        return key.removeprefix(trunk).split(".")[0]

    def is_asked(key: str) -> bool:
        return not is_new or (key.startswith(trunk) and part(key) != "pooler")

    missing = {key for key in found["missing_keys"] if is_asked(key) and not is_computed(model, key)}
    if missing:
        kind = type(model).__name__
        raise UsageError(f"--{flag} {path} lacks {listed(missing)} of a {kind}; expected {expected}")
    for name, stored, asked in sorted(key for key in found["mismatched_keys"] if is_asked(key[0])):
        raise UsageError(f"--{flag} {path}: {name} has shape {tuple(stored)}, by its config.json {tuple(asked)}")
    constants_of_model = {name for name, _ in model.named_buffers()}
    parts = {part(key) for key in model.state_dict() if is_asked(key)}
    homeless = {
        key
        for key in set(found["unexpected_keys"]) - constants_of_model
        if part(key) in parts and not key.endswith(OLD_CONSTANTS)
    }
    if homeless:
        raise UsageError(f"--{flag} {path} holds {listed(homeless)}, for which there is no place by its config.json")
    return model


def is_computed(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight is a table of sines that its module works out, so that not all files have it."""
    return "Sinusoidal" in type(model.get_submodule(key.rpartition(".")[0])).__name__


def listed(names: set[str], most: int = 3) -> str:
    """The first few of the names, in order, and how many more there are."""
    first = sorted(names)[:most]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(first) + more


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, problem: str) -> None:
    """Raise UsageError if the tokenizer has ids that the model lacks, but for special tokens that nothing here uses."""
    n_embedded = getattr(config.get_text_config(), "vocab_size", math.inf)
    roles = {getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "pad", "unk", "cls", "sep")}
    idle = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - roles
    n_ids = max(set(tokenizer.get_vocab().values()) - idle) + 1
    if n_ids > n_embedded:
        raise UsageError(f"{problem}: its tokenizer has {n_ids} tokens, its model embeds {n_embedded}")
    tokenizer.n_embedded = n_embedded  # for `bare_ids` of encoding.py: a text may hold one of the idle ones


def has_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """False of one that transformers has made up, of special tokens and at most the mark of a space, where there are no
    files of a tokenizer.
    """
    return len(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)) > 1


def no_tokenizer(flag: str, path: str) -> UsageError:
    return UsageError(
        f"--{flag} {path} holds no tokenizer: expected tokenizer.json, or what the tokenizer was saved as"
    )


def add_no_end(tokenizer: PreTrainedTokenizerBase, problem: str) -> None:
    """Have the tokenizer of a causal model put no EOS behind a text that is to be gone on from."""
    before, behind = special_ends(tokenizer)
    if not behind:
        return
    if not tokenizer.is_fast:
        raise UsageError(f"{problem}: its tokenizer ends every text with special tokens, and cannot be told not to")
    tokens = tokenizer.convert_ids_to_tokens(before)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*tokens, "$A"], special_tokens=list(zip(tokens, before, strict=True))
    )


def load_tokenizer(
    path: str, flag: str = "base_model_name", adapter: str = "", writes: bool = True
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or that beside the adapter on it, where there is one.

    It can pad, with its EOS where it has no pad token of its own. Where the model is one that `writes`, there has to be
    an EOS, and for a causal model none stands behind a text, which is to be gone on from. Its `n_embedded` is how many
    ids the model knows.
    """
    base = base_of(path)
    base_flag = flag if base == path else "base_model_name"
    if has_file(adapter, "tokenizer_config.json"):
        place, place_flag = adapter, "peft_model_path"
    elif base != path and has_file(path, "tokenizer_config.json"):
        place, place_flag = path, flag
    else:
        place, place_flag = base, base_flag
    if base != path:
        tell(f"{path} is an adapter, by its own settings of {base}, which is loaded")
    config = load(transformers.AutoConfig.from_pretrained, base_flag, base)
    versions = own_settings(place, "tokenizer_config.json").get("fast_tokenizer_files") or []
    check_names(versions, f"--{place_flag} {place}: its tokenizer_config.json")
    try:
        tokenizer = load(transformers.AutoTokenizer.from_pretrained, place_flag, place)
    except UsageError as error:
        raise no_tokenizer(place_flag, place) if "backend tokenizer" in str(error) else error from None
    if not has_words(tokenizer):
        raise no_tokenizer(place_flag, place)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    problem = f"--{place_flag} {place}"
    most = tokenizer.model_max_length
    if not isinstance(most, int | float) or most < 1:
        raise UsageError(f"{problem}: its tokenizer's model_max_length is {most!r}, expected a number of tokens")
    if tokenizer.pad_token_id is None or (writes and tokenizer.eos_token_id is None):
        raise UsageError(f"{problem}: its tokenizer has no end-of-sequence token, so no response could ever end")
    check_vocabulary(tokenizer, config, problem)
    if writes and not config.is_encoder_decoder:
        add_no_end(tokenizer, problem)
    return tokenizer


def thin_gradient(language_model: PreTrainedModel) -> None:
    """Where the input embedding is the output layer too, let its gradient be the rows read, not a matrix of zeros but
    for them: the output layer's, to which it is added, is a full one. For a model that is trained whole, as fused Adam
    takes no gradient that is sparse in the end, and in one process, as several sum theirs in full.
    """
    output_layer = language_model.get_output_embeddings()
    if output_layer is None:
        return
    for module in language_model.modules():
        if isinstance(module, torch.nn.Embedding) and module.weight is output_layer.weight:
            module.sparse = language_model.device.type == "cpu" and size() == 1  # the CPU is where it was measured


def check_packages(config: Config) -> None:
    """Raise UsageError if a package is not installed that is imported only where it is asked for."""
    others_in_8bit = config.task == "train" and (config.reference_in_8bit or config.reward_in_8bit)
    if config.load_in_8bit or config.load_in_4bit or others_in_8bit:
        check_installed("bitsandbytes", "loading in 8 or 4 bits")
    if config.has_adapter:
        check_installed("peft", "--lora_r" if config.lora_r else "--peft_model_path")


def quantized(
    device: torch.device,
    in_8bit: bool,
    in_4bit: bool = False,
    outliers_from: float = 0.0,
    kept: list[str] | None = None,
) -> dict:
    """The settings that load weights in 8 or 4 bits, but for the modules that are `kept` as they are: none named, the
    output layer. Raises UsageError if bitsandbytes is not installed.

    Columns of activations with a number of at least `outliers_from` anywhere in a batch are multiplied in 16 bits, in
    all its rows: a token's probability would hang on the texts beside it. 0: no column is.
    """
    if not (in_8bit or in_4bit):
        return {}
    check_installed("bitsandbytes", "loading in 8 or 4 bits")
    settings = transformers.BitsAndBytesConfig(
        load_in_8bit=in_8bit,
        load_in_4bit=in_4bit,
        bnb_4bit_quant_type="nf4",
        llm_int8_threshold=outliers_from,
        llm_int8_skip_modules=kept,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def keep_in_train_mode(module: torch.nn.Module) -> None:
    """Have `train` and `eval` pass the module by: one of 8 bits computes something else in eval mode, on a CPU with
    activations of 8 bits as well, so that an update would not score as sampling does. It has nothing that is random.
    """
    module.training = True
    module.train = types.MethodType(same, module)


def same(module: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    return module


def load_language_model(
    path: str,
    dtype: str,
    device: torch.device,
    in_8bit: bool = False,
    in_4bit: bool = False,
    flag: str = "base_model_name",
    allow_pickle: bool = False,
) -> PreTrainedModel:
    """A causal or an encoder-decoder language model, in the given dtype rather than the one it was stored in."""
    settings = quantized(device, in_8bit, in_4bit)
    config = prepare_config(load(transformers.AutoConfig.from_pretrained, flag, path))
    factory = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    settings["config"] = config
    settings["dtype"] = getattr(torch, dtype)
    model = load_weights(factory, flag, path, allow_pickle=allow_pickle, **settings)
    steady(model)
    return model if in_8bit or in_4bit else model.to(device)


def steady(model: PreTrainedModel) -> None:
    """Have weights in few bits, of which the files may say so themselves, compute the same in every mode and batch."""
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.state.threshold = 0.0
            keep_in_train_mode(module)
        module.support_avx512bf16_for_cpu = False  # else 4-bit weights are repacked, and the gradient is lost


def load_under_head(
    config: PretrainedConfig,
    path: str,
    dtype: str,
    device: torch.device,
    in_8bit: bool = False,
    in_4bit: bool = False,
    flag: str = "base_model_name",
    allow_pickle: bool = False,
) -> PreTrainedModel:
    """The trunk of the model at `path` as `load_language_model` loads it, under a classifier's head in float32, which
    is new where the files have none like it.
    """
    factory = transformers.AutoModelForSequenceClassification
    settings = {"config": config, "dtype": getattr(torch, dtype)}
    if in_8bit or in_4bit:
        with torch.device("meta"):
            kept = new_parts(factory.from_config(copy.deepcopy(config)))
        settings |= quantized(device, in_8bit, in_4bit, kept=kept)
    model = load_weights(factory, flag, path, is_new=True, allow_pickle=allow_pickle, **settings)
    steady(model)
    if model.dtype != torch.float32:
        for name in new_parts(model):
            keep_in_float32(model.get_submodule(name))
    return model if in_8bit or in_4bit else model.to(device)


def keep_in_float32(module: torch.nn.Module) -> None:
    """Have a module's weights in float32, and what it is given, too."""
    module.float()
    module.register_forward_pre_hook(lambda _, inputs: tuple(tensor.float() for tensor in inputs))


def check_encoder(kind: str, config: PretrainedConfig, path: str) -> None:
    """Raise UsageError if a critic of the kind `encoder` is asked of a model that has none."""
    if kind == "encoder" and not config.is_encoder_decoder:
        raise UsageError(
            f"--critic encoder is for encoder-decoders; {path} has no encoder: --critic separate or shared"
        )


def load_critic(
    kind: str,
    run: str | None,
    base_model: str,
    device: torch.device,
    flag: str = "base_model_name",
    allow_pickle: bool = False,
) -> PreTrainedModel | None:
    """The critic's own trunk: the one that a run saved, or a copy of the base model's; None for a shared one."""
    if kind == "shared":
        return None
    path = base_model if run is None else str(Path(run) / "critic")
    factory = transformers.AutoModel if kind == "separate" else transformers.AutoModelForTextEncoding
    critic_config = prepare_config(load(transformers.AutoConfig.from_pretrained, flag, path))
    if run is None:
        check_encoder(kind, critic_config, path)
    settings = {"config": critic_config, "dtype": torch.float32}
    critic = load_weights(factory, flag, path, allow_pickle=allow_pickle, **settings)
    return critic.to(device)


def saved_critic_kind(path: str, default: str) -> str | None:
    """What the value head that a run left in the folder reads: its manifest says so; None where there is no head."""
    if not (Path(path) / "value_head.safetensors").exists():
        return None
    manifest = Path(path) / "manifest.json"
    return read_object(manifest).get("critic", default) if manifest.exists() else default


def load_value_head(policy: PolicyModel, run: str) -> None:
    value_head = Path(run) / "value_head.safetensors"
    with one_sentence(f"{value_head} is no value head of this model"):
        policy.value_head.load_state_dict(load_file(value_head, device=str(policy.device)))


def load_base(
    config: Config, path: str, device: torch.device, adapter: str, flag: str = "base_model_name"
) -> PreTrainedModel:
    """The language model at `path`, under the adapter that the folder holds, or else the one at `adapter`, if any."""
    base, adapter = with_its_adapter(path, adapter, flag)
    base_flag = flag if base == path else "base_model_name"
    bits = (config.load_in_8bit, config.load_in_4bit)
    language_model = load_language_model(
        base, config.dtype, device, *bits, flag=base_flag, allow_pickle=config.allow_pickle
    )
    check_can_be_sampled(language_model, base, base_flag)
    return with_adapter(language_model, adapter, base, config.allow_pickle) if adapter else language_model


def with_value_head(
    language_model: PreTrainedModel, critic: PreTrainedModel | None, critic_kind: str, config: Config
) -> PolicyModel:
    mixed_precision = config.mixed_precision == "bf16"
    with one_sentence(f"--base_model_name {language_model.name_or_path} cannot be run"):
        return PolicyModel(language_model, critic, critic_kind, mixed_precision)


def load_policy(
    config: Config, path: str, device: torch.device, adapter: str = "", flag: str = "base_model_name"
) -> PolicyModel:
    """A policy as its folder says that it is: a whole model, or an adapter with the model that it names, with critic
    and value head where a run left them there. `adapter` is put on a whole model.
    """
    kind = saved_critic_kind(path, config.critic)
    critic = load_critic(kind, path, base_of(path), device, flag, config.allow_pickle) if kind else None
    policy = with_value_head(load_base(config, path, device, adapter, flag), critic, kind or "shared", config)
    if kind:
        load_value_head(policy, path)
    return policy


def to_be_trained(model: PreTrainedModel, config: Config) -> PreTrainedModel:
    """The model under its adapter, or else a new one, that alone is trained; without either, all of it is.

    Raises UsageError where --peft_model_path is folded in already: all weights would be trained without a word.
    """
    if hasattr(model, "peft_config"):
        return model
    if config.lora_r:
        return new_adapter(model, config)
    if config.peft_model_path:
        raise UsageError(
            f"--peft_model_path {config.peft_model_path} is folded into {model.name_or_path} already, which has no "
            "adapter left to train: leave it out to train all weights, or put a new one on with --lora_r"
        )
    thin_gradient(model)
    return model


def count_parameters(model: torch.nn.Module) -> str:
    """How many parameters there are, and how many of them are trained where an adapter freezes the rest."""
    whole = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{whole:,} parameters" + (f", of which {trained:,} are trained" if trained < whole else "")


def recompute_activations(model: PreTrainedModel, config: Config) -> None:
    """With --gradient_checkpointing, have activations computed anew for the gradient, in train mode."""
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})


def new_policy(config: Config, path: str, device: torch.device) -> PolicyModel:
    """What training starts from: the model at `path` under the adapter and with the critic that the config asks for.

    What is not there is new: an adapter that changes nothing, a critic from the base model, a value head of zeros.
    """
    language_model = to_be_trained(load_base(config, path, device, adapter_to_add(config, path)), config)
    run = path if saved_critic_kind(path, config.critic) == config.critic else None
    critic = load_critic(config.critic, run, base_of(path), device, allow_pickle=config.allow_pickle)
    policy = with_value_head(language_model, critic, config.critic, config)
    if run:
        load_value_head(policy, run)
    recompute_activations(policy.language_model, config)
    return policy


def check_can_be_sampled(language_model: PreTrainedModel, path: str, flag: str = "base_model_name") -> None:
    """Raise UsageError for a model that cannot be read as `PolicyModel` and `sample` read it, seen on a few tokens:
    with positions counted from 0, with a key/value cache, and with one that lasts when rows leave it.
    """
    config = language_model.config
    problem = f"--{flag} {path} ({config.model_type})"
    if config.is_encoder_decoder and config.decoder_start_token_id is None:
        raise UsageError(f"{problem}: its configuration has no decoder_start_token_id to begin with")
    with one_sentence(f"{problem} cannot be run"):
        readings = read_in_three_ways(language_model.eval())
    if readings is None:
        raise UsageError(f"{problem} gives no key/value cache (past_key_values), without which it cannot be sampled")
    exact = is_exact(language_model)
    reduce, tolerance = (torch.max, 0.01) if exact else (torch.mean, 0.5)  # nats; a fault makes 2 of the mean
    if difference(readings.whole, readings.counted, reduce) > tolerance:
        raise UsageError(f"{problem} does not count its positions from 0, by which prompts are padded on the left here")
    if difference(readings.whole[1:, 3:], readings.last, reduce) > tolerance:
        raise UsageError(f"{problem}: its cache gives other numbers when a row has left it; it cannot be sampled")


def load_reference(config: Config, path: str, policy: PolicyModel) -> PolicyModel:
    """The frozen reference: a copy of the policy as it starts, or with --reference_in_8bit its base model in 8 bits."""
    if not config.reference_in_8bit:
        return frozen_copy(policy)
    base, adapter = with_its_adapter(path, adapter_to_add(config, path))
    language_model = load_language_model(
        base, config.dtype, policy.device, in_8bit=True, allow_pickle=config.allow_pickle
    )
    if adapter:
        language_model = with_adapter(language_model, adapter, base, config.allow_pickle)
    return PolicyModel(language_model, mixed_precision=policy.mixed_precision).requires_grad_(False).eval()


def from_anywhere(path: str | None) -> str | None:
    """A Hub id as it is; a folder's name such that it can be found from another working directory, too."""
    return os.path.abspath(path) if path and Path(path).is_dir() else path


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, merge: bool = False) -> None:
    """The model, or its adapter alone, and the tokenizer in the formats of transformers and peft, loadable without this
    project. With `merge`, an adapter is folded into a copy of the whole model.

    Beside an adapter is what the base model's folder does not say: the ends of a response, a classifier's labels.
    """
    if merge and hasattr(model, "merge_and_unload"):
        model = merged(model)
    for adapter in getattr(model, "peft_config", {}).values():
        for name in ("target_modules", "modules_to_save"):
            if isinstance(getattr(adapter, name, None), set | list):
                names = sorted(set(getattr(adapter, name)))  # a set's order is another in every process
                setattr(adapter, name, names)
        adapter.base_model_name_or_path = from_anywhere(adapter.base_model_name_or_path)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's, a form that nobody has filled in
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    elif hasattr(model, "peft_config"):
        labels = copy.deepcopy(model.config)
        vars(labels).pop("quantization_config", None)  # of weights that are elsewhere
        labels.architectures = [type(model.get_base_model()).__name__]  # and not that of the base model's folder
        labels.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def loader_of(model: PreTrainedModel) -> str:
    """The Python that loads such a model with transformers alone, `{}` being the place."""
    if not model.can_generate():
        labels = ", config=transformers.AutoConfig.from_pretrained(FOLDER)" * hasattr(model, "peft_config")
        return f"transformers.AutoModelForSequenceClassification.from_pretrained({{}}{labels})"
    factory = "AutoModelForSeq2SeqLM" if model.config.is_encoder_decoder else "AutoModelForCausalLM"
    return f"transformers.{factory}.from_pretrained({{}})"


def save_policy(
    policy: PolicyModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    merge: bool = False,
    replaces: str = "",
    settings: Config | None = None,
) -> None:
    """The language model or its adapter, and the tokenizer, as by `write_model`; value head and critic beside them; and
    a manifest that says what is there.

    `replaces` as in `whole_folder`. With `settings`, they are written too, and the folder is a run to the tasks that
    use one.
    """
    with whole_folder(folder, replaces) as scratch:
        write_model(policy.language_model, tokenizer, scratch, merge)
        if policy.critic is not None:
            policy.critic.save_pretrained(scratch / "critic")
        head = {name: tensor.contiguous().cpu() for name, tensor in policy.value_head.state_dict().items()}
        save_file(head, scratch / "value_head.safetensors")
        if settings:
            write_settings(scratch, settings)
        loader = loader_of(policy.language_model)
        write_manifest(scratch, loader, base_of(str(scratch)), critic=policy.critic_kind)
