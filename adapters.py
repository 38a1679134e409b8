"""Adapters, such as LoRA: one is put on a model, new or as it was saved, and folded into it."""

import copy
from collections import Counter
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from config import Config, UsageError
from files import read_object
from hub import check_installed, has_file, load, one_sentence, pickle_refused, prepare_config


def base_of(path: str) -> str:
    """Where the whole model is: at the path itself, or where an adapter that is saved there says."""
    adapter = Path(path) / "adapter_config.json"
    if not adapter.exists():
        return path
    base = read_object(adapter).get("base_model_name_or_path", 0)
    base = path if base is None else base
    if not isinstance(base, str):
        raise UsageError(f"{adapter} cannot be read: its base_model_name_or_path is no text")
    return base


def adapter_to_add(config: Config, path: str) -> str:
    """--peft_model_path, or nothing where the model at `path` was made from that very adapter, and has it."""
    settings = Path(path) / "run_config.json"
    made_from = read_object(settings).get("peft_model_path") if settings.exists() else None
    return "" if made_from == config.peft_model_path else config.peft_model_path


def with_its_adapter(path: str, adapter: str, flag: str = "base_model_name") -> tuple[str, str]:
    """Where the whole model is, and the adapter on it: the one that `path` itself is, or else `adapter`, if any. Raises
    UsageError where there would be two.
    """
    base = base_of(path)
    if adapter and base != path:
        raise UsageError(f"--{flag} {path} is an adapter itself; --peft_model_path {adapter} cannot be added")
    return base, adapter if base == path else path


def adapter_settings(path: str, base: str, name: str, flag: str = "peft_model_path", allow_pickle: bool = False):
    """peft's settings of the adapter at `path`. Raises UsageError unless it is whole, changes weights, and is one of
    the model `base`, which may also be called by its own `name`.
    """
    import peft

    if Path(path).exists() and len(list(Path(path).glob("adapter_*"))) < 2:  # peft would ask the Hub for the other
        raise UsageError(f"--{flag} {path} lacks adapter_config.json or adapter_model.safetensors")
    settings = prepare_config(load(peft.PeftConfig.from_pretrained, flag, path))
    if settings.is_prompt_learning:
        kind = settings.peft_type.value
        raise UsageError(
            f"--{flag} {path} is of the kind {kind}, which puts vectors of its own before every text; "
            "expected an adapter that changes weights, such as LoRA"
        )
    if getattr(settings, "adapters", None):
        raise UsageError(f"--{flag} {path} is made of other adapters, that it names; expected one by itself")
    if not allow_pickle and not has_file(path, "adapter_model.safetensors"):
        raise pickle_refused(flag, path, "adapter_model.bin")
    settings.inference_mode = False
    own = settings.base_model_name_or_path or base
    if Path(own).name not in (Path(base).name, Path(name).name):
        raise UsageError(
            f"--{flag} {path} is an adapter of {own}, not of {base}; "
            f"if they are the same model, name it alike in {path}/adapter_config.json"
        )
    return settings


def task_of(model: PreTrainedModel) -> str:
    """What peft calls the use that a model is made for."""
    if not model.can_generate():
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def new_parts(model: PreTrainedModel) -> list[str]:
    """The names of what a classifier has beside a language model's trunk, to be trained whole: head and pooler."""
    if model.can_generate():
        return []
    trunk = model.base_model
    heads = [name for name, module in model.named_children() if module is not trunk and list(module.parameters())]
    has_pooler = getattr(trunk, "pooler", None) is not None
    return heads + [f"{model.base_model_prefix}.pooler"] * has_pooler


def new_adapter(model: PreTrainedModel, config: Config) -> PreTrainedModel:
    """The model under a new LoRA adapter of rank --lora_r, which changes nothing yet. It has no dropout. A classifier's
    head is trained beside it.
    """
    check_installed("peft", "--lora_r")
    import peft

    settings = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        task_type=task_of(model),
        modules_to_save=new_parts(model) or None,
    )
    other = "(an adapter that peft has made, for layers of your choice, is named by --peft_model_path)"
    with one_sentence(f"--lora_r {config.lora_r} finds no place in {model.name_or_path} {other}"):
        return peft.get_peft_model(model, settings)


def load_whole_adapter(adapted: PreTrainedModel, path: str) -> None:
    """Load all weights of an adapter. Raises ValueError where the file's are not those of the model."""
    result = adapted.load_adapter(path, "default", is_trainable=True)
    if result.missing_keys or result.unexpected_keys:
        raise ValueError("it has weights for other layers")


def load_under_new_head(adapted: PreTrainedModel, path: str) -> None:
    """Load what an adapter has for a classifier's trunk; its head stays as it is. Raises ValueError as above."""
    import peft

    own = peft.get_peft_model_state_dict(adapted)
    parts = adapted.peft_config["default"].modules_to_save
    head = {name: weight for name, weight in own.items() if any(f".{part}." in name for part in parts)}
    saved = peft.load_peft_weights(path, device="cpu")
    if (head | saved).keys() != own.keys():
        raise ValueError("it has weights for other layers")
    peft.set_peft_model_state_dict(adapted, head | saved)


def with_adapter(
    model: PreTrainedModel,
    path: str,
    base: str,
    allow_pickle: bool = False,
    flag: str = "peft_model_path",
    has_new_head: bool = False,
) -> PreTrainedModel:
    """The model, which is that of `base`, under the adapter at `path`, with the ends of a response saved beside it.

    The adapter alone is trained, in float32 whatever the base weights are in, and has no dropout; and with it the head
    of a classifier, which `has_new_head` where the adapter is a language model's. Raises UsageError for an adapter of
    another model.
    """
    check_installed("peft", f"--{flag}")
    import peft

    settings = adapter_settings(path, base, model.name_or_path, flag, allow_pickle)
    own = settings.base_model_name_or_path
    problem = f"--{flag} {path} is an adapter of {own}, not of {base}"
    if own in (None, base):
        problem = f"--{flag} {path} is an adapter that does not fit {base}"
    if has_new_head:
        settings.task_type, settings.modules_to_save = task_of(model), new_parts(model)
    if (settings.task_type == "SEQ_CLS") == model.can_generate():
        kinds = ["a classifier", "a language model"]
        found, expected = kinds if model.can_generate() else kinds[::-1]
        raise UsageError(f"--{flag} {path} is an adapter of {found}, expected one of {expected}")
    with one_sentence(problem):
        adapted = peft.get_peft_model(model, settings)
        if has_new_head:
            load_under_new_head(adapted, path)
        else:
            load_whole_adapter(adapted, path)
    if has_file(path, "generation_config.json"):
        model.generation_config = load(GenerationConfig.from_pretrained, flag, path)
    return adapted


def merged(language_model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the whole model with its adapter folded in.

    Where an adapted layer shares its weights with one that is not adapted, or otherwise, as input embedding and output
    layer do, it gets weights of its own first: else the other layer would get the adapter, too.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    copied = copy.deepcopy(language_model)
    n_uses = Counter(id(parameter) for _, parameter in copied.named_parameters(remove_duplicate=False))
    for module in copied.modules():
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            if n_uses[id(layer.weight)] > 1:
                layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
                copied.config.tie_word_embeddings = False
    return copied.merge_and_unload()
