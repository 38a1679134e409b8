"""What is in a folder or on the Hub: found and read, none of it run; what goes wrong is told in a sentence."""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from transformers import PretrainedConfig
from transformers.utils import cached_file, logging

from config import RunError, UsageError, first_line
from files import read_object
from trust import check_links

logging.set_verbosity_error()
logging.disable_progress_bar()
logging.get_logger("bitsandbytes").setLevel(logging.ERROR)
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # the Hub's robot is not asked to convert a pickle
warnings.filterwarnings("ignore", module="transformers|peft|bitsandbytes|huggingface_hub")

NO_ERRORS = {  # of `cached_file`: None for what is not there
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_connection_errors": False,
}


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
    """Turn what a library raises in the block into a UsageError that begins with the problem, unless memory ran out.

    A sentence of our own stays as it is.
    """
    try:
        yield
    except (UsageError, RunError):
        raise
    except Exception as error:  # a damaged file can raise anything
        if isinstance(error, MemoryError) or "tried to allocate" in str(error).lower():
            raise
        text = str(error).replace(":\n\t", ": ")  # torch begins a list below
        if "Weights only load failed" in text:
            text = "its pickle (.bin) holds more than numbers, and only these are read"
        reason = first_line(Exception(text or type(error).__name__))
        raise UsageError(f"{problem}: {reason}") from None


def load(from_pretrained: Callable, flag: str, path: str, **settings):
    """`from_pretrained(path)`, its many ways to fail told in one sentence that names the flag.

    Of a model only its numbers are taken, never code: without `trust_remote_code` False, transformers would ask whether
    to run it.
    """
    if Path(path).is_dir():
        check_links(Path(path), flag, depth=2)
        problem = "a folder without a usable model"
    elif Path(path).exists() or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise UsageError(f"--{flag} {path} is no folder, expected one in which a model is saved, or a Hub id")
    else:
        reason = hub_error() or "no reachable Hub model"
        problem = f"no folder, and {reason}"
    with one_sentence(f"--{flag} {path} is {problem}"):
        try:
            return from_pretrained(path, trust_remote_code=False, **settings)
        except (ValueError, OSError) as error:
            if "cannot be loaded with `safetensors`" in str(error):
                raise pickle_refused(flag, path) from None
            if "trust_remote_code" not in str(error):
                raise
            raise UsageError(
                f"--{flag} {path} can only be loaded by running code that comes with it, which is never done here; "
                "expected a model of a family that transformers has itself"
            ) from None


def pickle_refused(flag: str, path: str, name: str = ".bin") -> UsageError:
    return UsageError(
        f"--{flag} {path} has its weights in a pickle ({name}), which can hold code: expected safetensors "
        "(save_pretrained writes it), or --allow_pickle, to have the numbers alone read from it"
    )


def own_settings(path: str, name: str) -> dict:
    """The object in a JSON file of a folder or a Hub repository; an empty one where there is no such file."""
    file = None
    with suppress(OSError):  # of what can be no name of a repository
        file = cached_file(path, name, **NO_ERRORS)
    return read_object(Path(file)) if file else {}


def has_file(path: str, name: str) -> bool:
    """Whether a folder or a Hub repository has a file of that name."""
    with suppress(OSError):  # of what can be no name of a repository
        return path != "" and cached_file(path, name, **NO_ERRORS) is not None
    return False


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


def check_installed(package: str, what: str) -> None:
    if not importlib.util.find_spec(package):
        raise UsageError(f"{what} needs {package}: pip install {package}")
