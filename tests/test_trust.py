"""Folders of others: what they hold is read as numbers and text; nothing in them is run, and nothing elsewhere read.

Every payload would leave a file, or has text that is elsewhere.
"""

import json
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import datasets
import peft
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import constants
from micro import assert_refused, flags, question_flags, run_main
from safetensors.torch import load_file
from tiny_models import PAD, letter_tokenizer, tiny_gpt2
from transformers import GPT2ForSequenceClassification

from classifier import new_classifier
from config import Config, UsageError
from conversations import chat_text
from dataset import check_places, load_splits
from loading import load_critic, load_language_model, load_policy, load_tokenizer, new_policy
from reward_model import load_classifier
from trust import check_function, check_links, check_names, remember_function

pytest_plugins = ["micro"]

CPU = torch.device("cpu")


class Payload:
    """What makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def edit(path: Path, **changes) -> None:
    """Change an object in a file of JSON."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def model(tmp_path) -> Path:
    """A model's folder, with its tokenizer; what is run from it would leave `tmp_path / "ran"`."""
    folder = tmp_path / "model"
    tiny_gpt2().save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def load(folder, **settings) -> torch.nn.Module:
    return load_language_model(str(folder), "float32", CPU, **settings)


def pickled(folder: Path, content=None, name: str = "pytorch_model.bin") -> None:
    """The folder's weights, or something else, in a pickle in their place."""
    weights = next(folder.glob("*model.safetensors"))
    torch.save(content or load_file(weights), folder / name)
    weights.unlink()


# --------------------------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------------------------


def test_weights_in_a_pickle_are_read_where_that_is_asked_for_alone(model):
    weights = load(model).state_dict()
    pickled(model)
    with pytest.raises(UsageError) as refusal:
        load(model)
    assert str(refusal.value) == (
        f"--base_model_name {model} has its weights in a pickle (pytorch_model.bin), which can hold code: expected "
        "safetensors (save_pretrained writes it), or --allow_pickle, to have the numbers alone read from it"
    )
    loaded = load(model, allow_pickle=True).state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("as_torch_saves", [False, True])
def test_a_pickle_runs_no_code_whatever_is_allowed(as_torch_saves, allow_pickle, model, tmp_path):
    payload = Payload(tmp_path / "ran")
    pickled(model, {"weight": payload})
    if not as_torch_saves:
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(payload, protocol=2))
    words = "its pickle (.bin) holds more than numbers" if allow_pickle else "--allow_pickle"
    with pytest.raises(UsageError) as refusal:
        load(model, allow_pickle=allow_pickle)
    assert words in str(refusal.value)
    assert not (tmp_path / "ran").exists()
    if as_torch_saves:
        torch.load(model / "pytorch_model.bin", weights_only=False)
    else:
        pickle.loads((model / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "ran").exists()  # what it would have done


def test_the_command_reads_a_pickle_where_that_is_asked_for_alone(workplace, capsys):
    """A model to fine-tune first and a reward model, each alone in one."""
    for stage in ("sft", "reward"):
        pickled(shutil.copytree(f"saved_models/tiny/{stage}", workplace / stage))
    small = flags(max_prompt_length=12, prompt_tokens=8)
    tune = ["--task", "train", "--sft_first", "--base_model_name", "sft", "--reward_fn", "f.py:f", *small]
    score = ["--task", "train", "--base_model_name", "saved_models/tiny/sft", "--reward_model_path", "reward", *small]
    Path("f.py").write_text("def f(prompts, responses, rows):\n    return [1] * len(rows)\n")
    for command, flag in ((tune, "base_model_name sft"), (score, "reward_model_path reward")):
        assert_refused(capsys, workplace, command, f"--{flag} has its weights in a pickle (pytorch_model.bin)")
        assert run_main(*command, "--allow_pickle", "--dry_run") == 0


def test_pickles_beside_weights_are_not_read(model, tmp_path):
    """Nor those of a trainer: its arguments and its optimizer's state are always pickles."""
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save(Payload(tmp_path / "ran"), model / name)
    for allow_pickle in (False, True):
        assert load(model, allow_pickle=allow_pickle)
    assert not (tmp_path / "ran").exists()


def adapter_of(model: Path, folder: Path) -> Path:
    adapted = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder)
    edit(folder / "adapter_config.json", base_model_name_or_path=str(model))
    return folder


def test_an_adapter_in_a_pickle_is_as_a_model_in_one(model, tmp_path):
    adapter = adapter_of(model, tmp_path / "adapter")
    pickled(adapter, name="adapter_model.bin")
    named = Config(peft_model_path=str(adapter), allow_pickle=True)
    for config, path in ((Config(peft_model_path=str(adapter)), model), (Config(), adapter)):
        with pytest.raises(UsageError, match=r"adapter has its weights in a pickle \(adapter_model.bin\)"):
            new_policy(config, str(path), CPU)
    assert new_policy(named, str(model), CPU).language_model.peft_config
    torch.save({"weight": Payload(tmp_path / "ran")}, adapter / "adapter_model.bin")
    for config in (named, Config(peft_model_path=str(adapter))):
        with pytest.raises(UsageError, match=r"holds more than numbers|allow_pickle"):
            new_policy(config, str(model), CPU)
    assert not (tmp_path / "ran").exists()


def classifier_in(folder: Path, config: Config):
    return load_classifier(config, str(folder), letter_tokenizer(), CPU)


LOADERS = {  # every other place where weights are loaded
    "a classifier": classifier_in,
    "a new classifier's trunk": lambda folder, config: new_classifier(config, str(folder), {0: "a"}, PAD, CPU),
    "a policy": lambda folder, config: load_policy(config, str(folder), CPU),
    "a critic": lambda folder, config: load_critic(
        "separate", None, str(folder), CPU, allow_pickle=config.allow_pickle
    ),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_no_model_at_all_is_read_from_a_pickle_unasked(loader, model):
    if loader == "a classifier":
        GPT2ForSequenceClassification(tiny_gpt2(pad_token_id=PAD).config).save_pretrained(model)
    pickled(model)
    with pytest.raises(UsageError, match="has its weights in a pickle"):
        LOADERS[loader](model, Config())
    assert LOADERS[loader](model, Config(allow_pickle=True))


def index_of(folder: Path, shard: str, name: str = "model.safetensors.index.json") -> None:
    """An index that says that all weights are in that file, in place of the file itself."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}))


@pytest.mark.parametrize("shard", ["../other/model.safetensors", "{there}/other/model.safetensors", "a/../../other", 3])
def test_an_index_names_no_weights_elsewhere(shard, model, tmp_path):
    shutil.copytree(model, tmp_path / "other")
    index_of(model, shard.format(there=tmp_path) if isinstance(shard, str) else shard)
    with pytest.raises(UsageError, match=r"its model.safetensors.index.json names .*, expected a file in its own"):
        load(model)


def test_a_file_can_name_no_pickle_as_its_weights(model):
    """Neither an index for safetensors, nor a configuration, nor one that names an index."""
    pickled(model, name="adapter_model.bin")
    edit(model / "config.json", transformers_weights="adapter_model.bin")
    with pytest.raises(UsageError, match=r"has its weights in a pickle \(adapter_model.bin\)"):
        load(model)
    tiny_gpt2().save_pretrained(model)
    index_of(model, "adapter_model.bin", name="other.safetensors.index.json")
    edit(model / "config.json", transformers_weights="other.safetensors.index.json")
    with pytest.raises(UsageError, match=r"has its weights in a pickle \(adapter_model.bin\)"):
        load(model)
    edit(model / "other.safetensors.index.json", transformers_weights="other.safetensors.index.json", weight_map={})
    with pytest.raises(UsageError):
        load(model)  # and does not go round in circles


def test_a_model_of_many_files_is_loaded(model):
    tiny_gpt2().save_pretrained(model, max_shard_size="20KB")
    assert len(list(model.glob("model-*.safetensors"))) > 1
    (model / "model.safetensors").unlink(missing_ok=True)
    assert load(model)


def test_no_adapter_is_put_on_a_model_that_was_asked_for_whole(model, tmp_path):
    """transformers puts on what lies beside a model; where it is an adapter's base, peft's settings name that base."""
    shutil.copytree(adapter_of(model, tmp_path / "a"), tmp_path / "b", dirs_exist_ok=True)
    edit(tmp_path / "a/adapter_config.json", base_model_name_or_path=str(tmp_path / "b"))
    shutil.copytree(model, tmp_path / "b", dirs_exist_ok=True)
    with pytest.raises(UsageError, match="b holds an adapter of another model, expected a whole model"):
        load_policy(Config(), str(tmp_path / "a"), CPU)


def test_an_adapter_names_no_other_adapters(model, tmp_path):
    adapter = adapter_of(model, tmp_path / "adapter")
    mixed = {"peft_type": "XLORA", "adapters": {"0": str(tmp_path / "elsewhere")}, "hidden_size": 32}
    edit(adapter / "adapter_config.json", **mixed)
    with pytest.raises(UsageError, match="is made of other adapters, that it names"):
        new_policy(Config(peft_model_path=str(adapter)), str(model), CPU)


@pytest.fixture
def cached(model, tmp_path, monkeypatch):
    """The model as `made/up` in a cache of the Hub, where its files are links; its folder there."""
    repository = tmp_path / "hub/models--made--up"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def fill() -> Path:
        for file in model.iterdir():
            file.rename(repository / "blobs" / file.name)
            (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
        return snapshot

    return fill


def test_the_hubs_cache_is_read_by_its_links(cached):
    """By the id as by the folder itself."""
    snapshot = cached()
    assert load("made/up") and load(snapshot) and load_tokenizer(str(snapshot))


def test_a_pickle_of_the_hub_is_read_where_that_is_asked_for_alone(cached, model):
    pickled(model)
    cached()
    with pytest.raises(UsageError, match=r"^--base_model_name made/up has its weights in a pickle"):
        load("made/up")
    assert load("made/up", allow_pickle=True)


def test_an_index_of_the_hub_names_no_file_elsewhere(cached, model):
    index_of(model, "../../../../model/config.json")
    cached()
    with pytest.raises(UsageError, match=r"made/up: its model.safetensors.index.json names '../"):
        load("made/up")


# --------------------------------------------------------------------------------------------------------------------
# Code
# --------------------------------------------------------------------------------------------------------------------


def code_in(model: Path, tmp_path: Path) -> None:
    """Python files in the folder that leave a file when they are imported."""
    (model / "custom_generate").mkdir()
    (model / "custom_generate/requirements.txt").write_text("")
    for name in ("payload.py", "custom_generate/generate.py"):
        (model / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\ndef generate(model): pass\n")


CODE = {  # a file in a model's folder, and what it says to have code run
    "a configuration": ("config.json", {"auto_map": {"AutoConfig": "payload.C", "AutoModelForCausalLM": "payload.C"}}),
    "a family": ("config.json", {"auto_map": {"AutoConfig": "payload.C"}, "model_type": "new"}),
    "a trusting one": ("config.json", {"auto_map": {"AutoConfig": "payload.C"}, "trust_remote_code": True}),
    "a tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["payload.C", "payload.C"]}}),
    "a class": (
        "tokenizer_config.json",
        {"auto_map": {"AutoTokenizer": ["payload.C", "payload.C"]}, "tokenizer_class": "C", "trust_remote_code": True},
    ),
    "generation": ("generation_config.json", {"custom_generate": "model", "trust_remote_code": True}),
}


@pytest.mark.parametrize("name", CODE)
def test_no_file_of_a_model_has_code_run(name, model, tmp_path, monkeypatch):
    """It is loaded without, or refused; nobody is asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody is asked"))
    code_in(model, tmp_path)
    file, settings = CODE[name]
    edit(model / file, **settings)
    try:
        load_tokenizer("model")
        load_policy(Config(), "model", CPU)
    except UsageError as error:
        assert "can only be loaded by running code that comes with it, which is never done here" in str(error)
    assert not (tmp_path / "ran").exists()


def test_no_file_of_an_adapter_has_code_run(model, tmp_path, monkeypatch):
    """peft imports the parallel layers that an adapter names."""
    code_in(model, tmp_path)
    monkeypatch.syspath_prepend(model)
    adapter = adapter_of(model, tmp_path / "adapter")
    edit(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="payload")
    with pytest.raises(UsageError, match="is an adapter that does not fit"):
        load_policy(Config(), str(adapter), CPU)
    mapping = {"parent_library": "payload", "base_model_class": "C"}
    edit(adapter / "adapter_config.json", megatron_config=None, auto_mapping=mapping, task_type=None)
    assert load_policy(Config(), str(adapter), CPU)
    assert not (tmp_path / "ran").exists()


def test_no_file_of_a_model_names_code_on_the_hub(model, monkeypatch):
    """As a way to compute attention, which transformers would fetch; the way that it takes by itself is taken."""
    fetch = "transformers.modeling_utils.lazy_import_flash_attention"
    monkeypatch.setattr(fetch, lambda *_, **__: pytest.fail("code is fetched"))
    edit(model / "config.json", attn_implementation="made/up", _attn_implementation_internal="made/up")
    assert load(model).config._attn_implementation == "sdpa"
    assert new_classifier(Config(), str(model), {0: "a"}, PAD, CPU).config._attn_implementation == "sdpa"


def test_a_tokenizer_is_read_from_its_own_folder(model, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (model / "tokenizer.json").rename(tmp_path / "elsewhere/tokenizer.5.0.0.json")
    settings = {"fast_tokenizer_files": ["../elsewhere/tokenizer.5.0.0.json"]}
    edit(model / "tokenizer_config.json", **settings)
    with pytest.raises(UsageError, match=r"its tokenizer_config.json names '../elsewhere/tokenizer.5.0.0.json'"):
        load_tokenizer(str(model))
    edit(model / "tokenizer_config.json", fast_tokenizer_files=[], tokenizer_file=str(tmp_path / "elsewhere"))
    with pytest.raises(UsageError, match="holds no tokenizer"):
        load_tokenizer(str(model))


ESCAPES = [
    "{{ cycler.__init__.__globals__.os.mkdir('RAN') }}",
    "{{ lipsum.__globals__['os'].mkdir('RAN') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception.__globals__['os'].mkdir('RAN') }}",
    "{{ (messages|attr('__class__')|attr('__base__'))() }}",
    "{% set _ = messages.append(messages[0]) %}{{ messages|length }}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_does_nothing_but_write_a_text(template, model, tmp_path):
    for file in model.glob("chat_template*"):
        file.unlink()
    edit(model / "tokenizer_config.json", chat_template=template.replace("RAN", str(tmp_path / "ran")))
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(UsageError, match=r"the chat template of .* refuses"):
        chat_text(messages, {}, load_tokenizer(str(model)))
    assert len(messages) == 1 and not (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------------------


def rows_in(folder: Path, text: str = "own") -> Path:
    folder.mkdir()
    (folder / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n")
    return folder


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """The folder of a dataset; beside it is another one, which nobody has named."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows_in(tmp_path / "secret", "secret")
    return rows_in(tmp_path / "data")


def card(folder: Path, **settings) -> None:
    """A README that says how the folder is to be loaded."""
    settings = {"configs": [{"config_name": "default"} | settings]}
    (folder / "README.md").write_text(f"---\n{json.dumps(settings)}\n---\n# Data\n")  # JSON is YAML


CARDS = {
    "climbing": {"data_files": "../secret/rows.jsonl"},
    "absolute": {"data_files": "{there}/secret/rows.jsonl"},
    "a list": {"data_files": ["rows.jsonl", "../secret/*.jsonl"]},
    "by split": {"data_files": [{"split": "train", "path": ["../secret/rows.jsonl"]}]},
    "a folder": {"data_dir": "../secret"},
    "another host": {"data_files": "http://localhost:9/rows.jsonl"},
    "another protocol": {"data_files": "file://{there}/secret/rows.jsonl"},
    "a chain of them": {"data_files": "simplecache::http://localhost:9/rows.jsonl"},
    "another repository": {"data_files": "hf://datasets/made/up/rows.jsonl"},
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_names_no_rows_elsewhere(name, data, tmp_path):
    """In the README as in the file that goes before it."""
    card(data, **json.loads(json.dumps(CARDS[name]).replace("{there}", str(tmp_path))))
    with pytest.raises(
        UsageError, match=r"^--dataset_path .*: its README.md names .*, expected a file in its own folder"
    ):
        load_splits(str(data))
    (data / ".huggingface.yaml").write_text((data / "README.md").read_text().split("---")[1])
    card(data, data_files="rows.jsonl")
    with pytest.raises(UsageError, match=r"its .huggingface.yaml names"):
        load_splits(str(data))


@pytest.mark.parametrize(
    "own", [{"data_files": "rows.jsonl"}, {"data_files": [{"split": "train", "path": "r*.jsonl"}]}, {}]
)
def test_a_card_that_names_the_folders_own_rows_is_followed(own, data):
    card(data, **own)
    assert load_splits(str(data))["train"].to_list() == [{"text": "own"}]


def test_a_card_on_the_hub_names_no_rows_elsewhere(data, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub/datasets--made--up/snapshots" / ("0" * 40)
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs/main").write_text("0" * 40)
    card(data, data_files=f"{tmp_path}/secret/rows.jsonl")
    shutil.copytree(data, snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"^--dataset_path made/up: its README.md names '/"):
        check_places("made/up")


def test_rows_behind_a_link_are_not_read(data):
    (data / "more.jsonl").symlink_to("../secret/rows.jsonl")
    with pytest.raises(UsageError, match=r"more.jsonl is a link to ../secret/rows.jsonl, which is outside"):
        load_splits(str(data))


def test_a_saved_dataset_names_no_rows_elsewhere(data, tmp_path):
    for name in ("own", "secret"):
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": [name]})}).save_to_disk(
            tmp_path / f"to-{name}"
        )
    own = tmp_path / "to-own"
    assert load_splits(str(own))["train"].to_list() == [{"text": "own"}]
    elsewhere = "../../to-secret/train/data-00000-of-00001.arrow"
    edit(own / "train/state.json", _data_files=[{"filename": elsewhere}])
    with pytest.raises(UsageError, match=f"its train/state.json names '{elsewhere}', expected a file in its own"):
        load_splits(str(own))
    edit(own / "dataset_dict.json", splits=["../to-secret/train"])
    with pytest.raises(UsageError, match=r"its dataset_dict.json names '../to-secret/train', expected"):
        load_splits(str(own))


@pytest.mark.parametrize("name", ["data.py", "rows.py"])
def test_no_script_of_a_dataset_is_run(name, data, tmp_path):
    (data / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with suppress(UsageError):
        assert load_splits(str(data))["train"].to_list() == [{"text": "own"}]
    pickled_rows = rows_in(tmp_path / "pickles") / "rows.pkl"
    pickled_rows.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    assert load_splits(str(pickled_rows.parent))["train"].to_list() == [{"text": "own"}]
    assert not (tmp_path / "ran").exists()


def test_what_a_row_names_as_an_image_is_not_opened(data, tmp_path):
    """A file of one row is looked at by itself; it may say that a column holds images, and where they are."""
    features = datasets.Features({"text": datasets.Image()})
    table = pyarrow.table({"text": [{"path": str(tmp_path / "secret/rows.jsonl"), "bytes": None}]})
    pyarrow.parquet.write_table(table.cast(features.arrow_schema), data / "rows.parquet")
    rows = load_splits(str(data / "rows.parquet"))["train"]
    with pytest.raises(Exception, match="cannot identify image file"):
        rows[0]


# --------------------------------------------------------------------------------------------------------------------
# Links and names
# --------------------------------------------------------------------------------------------------------------------


def test_a_link_out_of_a_models_folder_is_refused(model, tmp_path):
    """One within it is not."""
    (model / "model.safetensors").rename(tmp_path / "elsewhere")
    (model / "model.safetensors").symlink_to("../elsewhere")
    with pytest.raises(UsageError) as refusal:
        load(model)
    assert str(refusal.value) == (
        f"--base_model_name {model}: model.safetensors is a link to ../elsewhere, which is outside of the folder; "
        "expected the file itself"
    )
    (tmp_path / "elsewhere").rename(model / "weights")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("weights")
    assert load(model)
    (tmp_path / "link").symlink_to(model)
    assert load(tmp_path / "link")  # which was named


def test_links_are_found_where_files_are_read(tmp_path):
    folder = tmp_path / "folder"
    (folder / "a/b/.git").mkdir(parents=True)
    for place in ("a/b/.git/link", "a/b/back"):
        (folder / place).symlink_to(tmp_path / "outside" if "git" in place else folder / "a")
    check_links(folder, "flag")
    for place in ("a/b/link", ".link", "a/link"):
        (folder / place).symlink_to(tmp_path if place == "a/link" else "/nowhere")
        with pytest.raises(UsageError, match=f"--flag {folder}: {place} is a link to"):
            check_links(folder, "flag")
        if place == "a/b/link":
            check_links(folder, "flag", depth=2)
        (folder / place).unlink()


ELSEWHERE = ["../a", "a/../b", "/a", "~/a", "http://x/a", "a.json::http://x", "c:a", "a\\b", ".git/a", "a/.b", 3, None]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_of_files_elsewhere_are_refused(name):
    check_names(["a", "a/b-00001.safetensors", "./a", "data/**/*.jsonl", "train-*"], "flag")
    with pytest.raises(UsageError, match=r"^x.json names .*, expected a file in its own folder$"):
        check_names(["a", name], "x.json")


# --------------------------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------------------------

REWARD = "def reward(prompts, responses, rows):\n    return [len(response) for response in responses]\n"


@pytest.fixture
def foreign(workplace, monkeypatch) -> Path:
    """A run's folder that has come from elsewhere; the code in it, and beside it, would leave a file."""
    monkeypatch.setenv("XDG_STATE_HOME", str(workplace / "state"))
    run = Path("saved_models/tiny/ppo").rename("foreign")
    for place in (run, workplace):
        (place / "code.py").write_text(f"open({str(workplace / 'ran')!r}, 'w')\n{REWARD}")
    return run


ASKING = [
    ["--task", "evaluate"],
    ["--task", "generate", "--prompt", "A", "--output", "out.jsonl"],
    ["--task", "explain", "--prompt", "A"],
]


@pytest.mark.parametrize("task", ASKING, ids=["evaluate", "generate", "explain"])
@pytest.mark.parametrize("function", ["foreign/code.py:reward", "code.py:reward", "./foreign/../code.py:reward"])
def test_no_function_is_run_because_a_run_names_it(function, task, foreign, workplace, capsys):
    edit(foreign / "run_config.json", reward_fn=function, base_model_name="saved_models/tiny/sft")
    command = [*task, "--output_dir", "foreign"]
    assert_refused(capsys, workplace, command, f"foreign was rewarded by the function {function}", "--reward_fn")
    assert run_main("--task", "generate", "--output_dir", "foreign", "--prompt", "A") == 0
    assert run_main("--task", "plot", "--output_dir", "foreign", "--dry_run") == 0
    assert not (workplace / "ran").exists()
    assert run_main(*command, "--dry_run", "--reward_fn", function) == 0
    assert (workplace / "ran").exists()


def test_the_function_of_a_run_of_ones_own_is_run_again(
    questions, tmp_path, monkeypatch, t5_folder, no_figures, capsys
):
    """Where the notes are gone, or none could be left, it has to be named."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    train = ["--task", "train", *question_flags(t5_folder), "--output_dir", str(tmp_path / "run")]
    evaluate = ["--task", "evaluate", "--output_dir", str(tmp_path / "run"), "--dry_run"]
    assert run_main(*train, "--dry_run") == 0
    assert not (tmp_path / "state").exists()
    assert run_main(*train) == 0
    assert run_main(*evaluate) == 0
    assert f"using --base_model_name {t5_folder}, --dataset_path prompts.jsonl, --reward_fn rewards.py:reward\n" in (
        capsys.readouterr().err
    )
    notes = tmp_path / "state/ppo/reward_functions"
    assert notes.read_text() == f"{questions}/rewards.py:reward\n"
    shutil.rmtree(tmp_path / "state")
    assert run_main(*evaluate) == 2
    (tmp_path / "state").write_text("no folder")
    remember_function("rewards.py:reward")
    assert run_main(*evaluate) == 2
    assert run_main(*evaluate, "--reward_fn", "rewards.py:reward") == 0


def test_a_function_is_noted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for spec in ("a.py:f", f"{tmp_path}/a.py:f", "./a.py:f", "b.py:f"):
        remember_function(spec)
    assert (tmp_path / "ppo/reward_functions").read_text() == f"{tmp_path}/a.py:f\n{tmp_path}/b.py:f\n"
    check_function("x/../b.py:f", Path("run"))
    with pytest.raises(UsageError, match=r"^run was rewarded by the function a.py:g, which no run of yours was"):
        check_function("a.py:g", Path("run"))


def test_a_run_says_nothing_that_only_a_command_can(foreign, workplace, capsys):
    """Where its responses go, that a pickle may be read, and the like."""
    own = {"output": "written", "prompt": ["A"], "allow_pickle": True, "dry_run": True, "policies": ["a=b"]}
    edit(foreign / "run_config.json", **own)
    assert run_main("--task", "generate", "--output_dir", "foreign", "--prompt", "The film") == 0
    assert "The film" in capsys.readouterr().out and not Path("written").exists()
    pickled(foreign)
    assert_refused(capsys, workplace, ["--task", "generate", "--output_dir", "foreign", "--prompt", "A"], "in a pickle")


@pytest.mark.parametrize("name", ["../../elsewhere", "/elsewhere", "a/../../b"])
def test_a_run_is_not_named_out_of_the_folder_of_runs(name, foreign, workplace, capsys):
    """Where `evaluate` would leave a judge."""
    edit(foreign / "run_config.json", run_name=name)
    assert_refused(capsys, workplace, ["--task", "evaluate", "--output_dir", "foreign"], "is not under saved_models/")
    assert_refused(capsys, workplace, ["--task", "train", *flags(run_name=name)], "is not under saved_models/")


@pytest.mark.parametrize(
    "name", ["results", "plots", "checkpoints", "run_config.json", ".comparison.json.1.unfinished"]
)
def test_nothing_is_written_through_a_link_of_a_run(name, foreign, workplace, capsys):
    (workplace / "elsewhere").mkdir()
    (workplace / "elsewhere/test_results_reviews.csv").write_text("mine")
    with suppress(OSError):
        (foreign / name).rename(f"moved-{name}")
    (foreign / name).symlink_to(workplace / ("moved-run_config.json" if "config" in name else "elsewhere"))
    for task in ("evaluate", "plot"):
        words = f"--output_dir foreign: {name} is a link to"
        assert_refused(capsys, workplace, ["--task", task, "--output_dir", "foreign"], words)
    others = ["--task", "plot", "--output_dir", "saved_models/tiny/ppo", "--policies", "foreign"]
    shutil.copytree(foreign, "saved_models/tiny/ppo", symlinks=False)
    assert_refused(capsys, workplace, others, f"--policies foreign: {name} is a link to")
