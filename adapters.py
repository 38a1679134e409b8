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


def check_is_whole(path: str, flag: str) -> None:
    """Raise UsageError for a folder that holds an adapter alone, where a whole model is trained or asked."""
    base = base_of(path)
    if base != path:
        raise UsageError(
            f"--{flag} {path} is an adapter of {base}, expected a whole model: merge the two (--merge, or "
            "merge_and_unload of peft) and save that"
        )


def adapter_settings(path: str, base: str, name: str, allow_pickle: bool = False):
    """peft's settings of the adapter at `path`. Raises UsageError unless it is whole, changes weights, and is one of
    the model `base`, which may also be called by its own `name`.
    """
    import peft

    if Path(path).exists() and len(list(Path(path).glob("adapter_*"))) < 2:  # peft would ask the Hub for the other
        raise UsageError(f"--peft_model_path {path} lacks adapter_config.json or adapter_model.safetensors")
    settings = prepare_config(load(peft.PeftConfig.from_pretrained, "peft_model_path", path))
    if settings.is_prompt_learning:
        kind = settings.peft_type.value
        raise UsageError(
            f"--peft_model_path {path} is of the kind {kind}, which puts vectors of its own before every text; "
            "expected an adapter that changes weights, such as LoRA"
        )
    if getattr(settings, "adapters", None):
        raise UsageError(f"--peft_model_path {path} is made of other adapters, that it names; expected one by itself")
    if not allow_pickle and not has_file(path, "adapter_model.safetensors"):
        raise pickle_refused("peft_model_path", path, "adapter_model.bin")
    settings.inference_mode = False
    own = settings.base_model_name_or_path or base
    if Path(own).name not in (Path(base).name, Path(name).name):
        raise UsageError(
            f"--peft_model_path {path} is an adapter of {own}, not of {base}; "
            f"if they are the same model, name it alike in {path}/adapter_config.json"
        )
    return settings


def new_adapter(language_model: PreTrainedModel, config: Config) -> PreTrainedModel:
    """The model under a new LoRA adapter of rank --lora_r, which changes nothing yet. It has no dropout."""
    check_installed("peft", "--lora_r")
    import peft

    task = "SEQ_2_SEQ_LM" if language_model.config.is_encoder_decoder else "CAUSAL_LM"
    settings = peft.LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, task_type=task)
    with one_sentence(f"--lora_r {config.lora_r} finds no place in {language_model.name_or_path}"):
        return peft.get_peft_model(language_model, settings)


def with_adapter(language_model: PreTrainedModel, path: str, base: str, allow_pickle: bool = False) -> PreTrainedModel:
    """The model, which is that of `base`, under the adapter at `path`, with the ends of a response saved beside it.

    The adapter alone is trained, in float32 whatever the base weights are in, and has no dropout. Raises UsageError for
    an adapter of another model.
    """
    check_installed("peft", "--peft_model_path")
    import peft

    settings = adapter_settings(path, base, language_model.name_or_path, allow_pickle)
    own = settings.base_model_name_or_path
    problem = f"--peft_model_path {path} is an adapter of {own}, not of {base}"
    if own in (None, base):
        problem = f"--peft_model_path {path} is an adapter that does not fit {base}"
    with one_sentence(problem):
        adapted = peft.get_peft_model(language_model, settings)
        result = adapted.load_adapter(path, "default", is_trainable=True)
        if result.missing_keys or result.unexpected_keys:
            raise ValueError("it has weights for other layers")
    if has_file(path, "generation_config.json"):
        language_model.generation_config = load(GenerationConfig.from_pretrained, "peft_model_path", path)
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
