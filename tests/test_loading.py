"""Tokenizers and models from folders and configurations, and how it is told when they cannot be had."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from helpers import assert_close
from safetensors.torch import load_file, save_file
from tiny_models import EOS, FAMILIES, GPT2_SIZE, PAD, VOCAB, letter_tokenizer, tiny_gpt2, tiny_policy, tiny_t5
from transformers import (
    AutoConfig,
    BertConfig,
    BertForSequenceClassification,
    EncoderDecoderConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MT5Config,
    PreTrainedTokenizerFast,
    T5Config,
)

import loading
from classifier import new_classifier
from config import Config, UsageError
from hub import has_file, load, prepare_config
from loading import load_language_model, load_policy, load_tokenizer, new_policy, save_policy
from probe import context_length
from reward_model import load_reward_model
from sft import new_language_model, new_tokenizer

CPU = torch.device("cpu")

# ----------------------------------------------------------------------------------------------------------------
# Tokenizers
# ----------------------------------------------------------------------------------------------------------------

TEXTS = ["the film was good, and the film was long", "a film that was not good"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return new_tokenizer(TEXTS, 280, 64)


@pytest.mark.parametrize(
    "text",
    [
        "the film was good",
        " leading and trailing ",
        "two  spaces, a\ttab and\nnew\r\nlines",
        "don 't , do n't . . .",  # what a tokenizer that tidies up spaces would change
        "naïve café — “quoted” €5",
        "Кино 映画 영화 سينما ภาพยนตร์",
        "🎬👩‍👩‍👧‍👦 e\u0301 \u200b \x00 \ufffd \U0010ffff",
    ],
)
def test_a_new_tokenizer_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.unk_token is None


def test_a_new_tokenizer_gives_every_character_back(tokenizer):
    """Every code point that is not half of a pair."""
    characters = [chr(i) for i in [*range(0xD800), *range(0xE000, 0x110000, 97)]]
    for start in range(0, len(characters), 4000):
        text = "".join(characters[start : start + 4000])
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_new_tokenizer_learns_merges_and_knows_its_ends(tokenizer):
    assert len(tokenizer) == 280
    assert len(tokenizer(TEXTS[0]).input_ids) < len(TEXTS[0]) / 2
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.bos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode([tokenizer.eos_token_id, tokenizer.pad_token_id]) == "<|endoftext|><|pad|>"
    assert tokenizer.decode([tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == ""
    assert tokenizer.eos_token_id not in tokenizer("the film").input_ids
    assert tokenizer.model_max_length == 64


def save_with_model(tokenizer, folder: Path, vocab_size: int = VOCAB) -> None:
    """The tokenizer, beside the configuration of a model that embeds so many tokens."""
    tokenizer.save_pretrained(folder)
    GPT2Config(vocab_size=vocab_size).save_pretrained(folder)


def test_a_saved_tokenizer_is_the_same_when_loaded(tokenizer, tmp_path):
    save_with_model(tokenizer, tmp_path, 280)
    loaded = load_tokenizer(str(tmp_path))
    text = "the film 🎬 was  good ."
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert loaded.model_max_length == 64


def test_a_tokenizer_without_a_pad_token_pads_with_its_eos_token(tmp_path):
    save_with_model(
        PreTrainedTokenizerFast(tokenizer_object=letter_tokenizer()._tokenizer, eos_token="<eos>"), tmp_path
    )
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id == EOS


def test_an_own_pad_token_is_kept(tmp_path):
    save_with_model(letter_tokenizer(), tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == PAD


def test_a_policys_tokenizer_needs_an_eos_token_and_a_reward_models_does_not(tmp_path):
    save_with_model(
        PreTrainedTokenizerFast(tokenizer_object=letter_tokenizer()._tokenizer, pad_token="<pad>"), tmp_path
    )
    assert load_tokenizer(str(tmp_path), "reward_model_path", writes=False).pad_token_id == PAD
    for flag in ("base_model_name", "policies"):
        with pytest.raises(UsageError, match=f"--{flag} {tmp_path}: its tokenizer has no end-of-sequence token"):
            load_tokenizer(str(tmp_path), flag)


def test_a_file_where_a_model_is_expected_is_refused_as_that(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name in ("model.safetensors", "model.safetensors/below"):
        words = "is no folder, expected one in which a model is saved"
        with pytest.raises(UsageError, match=f"--base_model_name {tmp_path / name} {words}"):
            load_tokenizer(str(tmp_path / name))


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bert", "llama"])
def test_a_folder_without_a_tokenizer_is_refused(kind, tmp_path):
    """transformers would make one up, by which a text has no token or only unknown ones, or speak of its backend."""
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    for flag, writes in (("base_model_name", True), ("reward_model_path", False)):
        with pytest.raises(UsageError, match=rf"--{flag} {tmp_path} holds no tokenizer: expected tokenizer\.json"):
            load_tokenizer(str(tmp_path), flag, writes=writes)


@pytest.mark.parametrize("flag", ["base_model_name", "reward_model_path", "policies"])
def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused(flag, tmp_path):
    """Its last tokens would be an index error; a model may embed more than that, as many do to be even."""
    save_with_model(letter_tokenizer(), tmp_path, VOCAB - 1)
    words = f"--{flag} {tmp_path}: its tokenizer has {VOCAB} tokens, its model embeds {VOCAB - 1}"
    with pytest.raises(UsageError, match=words):
        load_tokenizer(str(tmp_path), flag)
    for enough in (VOCAB, VOCAB + 1):
        save_with_model(letter_tokenizer(), tmp_path, enough)
        assert load_tokenizer(str(tmp_path), flag)("abc").input_ids == [2, 3, 4]


def test_the_tokenizer_beside_an_adapter_is_compared_with_the_adapters_base_model(tmp_path):
    letter_tokenizer().save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": f"{tmp_path}/base"}))
    GPT2Config(vocab_size=VOCAB).save_pretrained(tmp_path / "base")
    assert load_tokenizer(str(tmp_path / "adapter")).eos_token_id == EOS
    GPT2Config(vocab_size=VOCAB - 1).save_pretrained(tmp_path / "base")
    with pytest.raises(UsageError, match=f"--output_dir {tmp_path}/adapter: .* embeds {VOCAB - 1}"):
        load_tokenizer(str(tmp_path / "adapter"), "output_dir")


# ----------------------------------------------------------------------------------------------------------------
# What cannot be loaded
# ----------------------------------------------------------------------------------------------------------------


def assert_one_sentence(error: UsageError, *parts: str) -> None:
    message = str(error)
    assert "\n" not in message
    assert len(message) < 700  # the folders of a test have long names
    for part in parts:
        assert part in message


@pytest.mark.parametrize("load", [load_tokenizer, lambda path: load_language_model(path, "float32", CPU)])
def test_a_folder_that_is_not_there_is_a_usage_error_naming_the_flag(load, tmp_path):
    path = str(tmp_path / "nothing" / "here" / "at all")
    with pytest.raises(UsageError) as caught:
        load(path)
    assert_one_sentence(caught.value, f"--base_model_name {path}", "no folder")


@pytest.mark.parametrize(
    "content",
    [None, "{}", '{"model_type": "no-such-thing"}', "not json", "[]", '{"model_type": "gpt2", "n_layer": "x"}'],
)
def test_a_folder_without_a_usable_model_is_a_usage_error_naming_the_flag(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError) as caught:
        load_language_model(str(tmp_path), "float32", CPU)
    assert_one_sentence(caught.value, f"--base_model_name {tmp_path}", "a folder without a usable model")
    with pytest.raises(UsageError) as caught:
        load_reward_model(Config(), str(tmp_path), CPU)
    assert_one_sentence(caught.value, f"--reward_model_path {tmp_path}", "a folder without a usable model")


def test_a_folder_with_a_configuration_and_no_weights_is_a_usage_error(tmp_path):
    tiny_gpt2().config.save_pretrained(tmp_path)
    with pytest.raises(UsageError) as caught:
        load_policy(Config(), str(tmp_path), CPU)
    assert_one_sentence(caught.value, f"--base_model_name {tmp_path}")


def test_a_broken_weights_file_is_a_usage_error(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UsageError) as caught:
        load_policy(Config(), str(tmp_path), CPU)
    assert_one_sentence(caught.value, f"--base_model_name {tmp_path}")


def test_weights_of_another_size_are_named(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=2, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(UsageError) as caught:
        load_language_model(str(tmp_path), "float32", CPU)
    assert_one_sentence(caught.value, f"--base_model_name {tmp_path}", "size")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_a_lack_of_memory_is_no_mistake_of_the_folders(error, tmp_path):
    """It passes as it is, for the sentence that names what needs less; a folder's name is not taken for it."""

    def raise_it(path, trust_remote_code):
        raise error

    with pytest.raises(type(error), match=str(error) or None):
        load(raise_it, "base_model_name", str(tmp_path))
    with pytest.raises(UsageError, match="--base_model_name out of memory is no folder"):
        load_tokenizer("out of memory")


# ----------------------------------------------------------------------------------------------------------------
# Weights that are not all there, and code that comes with them
# ----------------------------------------------------------------------------------------------------------------


def change_weights(folder: Path, file: str = "model.safetensors", **changes: torch.Tensor | None) -> None:
    """Take the weights whose names contain a key of `changes` away, and put its tensor, if any, in their place."""
    weights = load_file(folder / file)
    for name, tensor in changes.items():
        weights = {key: value for key, value in weights.items() if name not in key}
        weights |= {} if tensor is None else {name: tensor}
    save_file(weights, folder / file, metadata={"format": "pt"})


def change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(params=["gpt2", "t5"])
def family_folder(request, tmp_path) -> Path:
    save_policy(tiny_policy(request.param), letter_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


LAYER_OF = {"gpt2": ("transformer.h.1.", "n_layer"), "t5": ("decoder.block.1.", "num_decoder_layers")}


def family_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["model_type"]


@pytest.mark.parametrize("loads", [load_policy, new_policy])
def test_a_layer_without_weights_is_refused(family_folder, loads):
    """transformers would make it of random numbers."""
    layer, _ = LAYER_OF[family_of(family_folder)]
    change_weights(family_folder, **{layer: None})
    with pytest.raises(UsageError) as caught:
        loads(Config(), str(family_folder), CPU)
    assert_one_sentence(caught.value, f"--base_model_name {family_folder} lacks {layer}", "more of a ", "a whole model")
    with pytest.raises(UsageError, match=rf"--output_dir {family_folder} lacks {re.escape(layer)}"):
        load_policy(Config(), str(family_folder), CPU, flag="output_dir")


@pytest.mark.parametrize("n_layers", [1, 3])
def test_a_configuration_of_another_depth_is_refused(family_folder, n_layers):
    layer, name = LAYER_OF[family_of(family_folder)]
    change_config(family_folder, **{name: n_layers})
    with pytest.raises(UsageError) as caught:
        load_policy(Config(), str(family_folder), CPU)
    if n_layers == 1:
        assert_one_sentence(caught.value, f"holds {layer}", "for which there is no place by its config.json")
    else:
        assert_one_sentence(caught.value, f"lacks {layer.replace('1', '2')}")


def test_weights_of_another_shape_are_refused_by_name(family_folder):
    name = {"gpt2": "transformer.wpe.weight", "t5": "decoder.final_layer_norm.weight"}[family_of(family_folder)]
    change_weights(family_folder, **{name: torch.zeros(7)})
    with pytest.raises(UsageError) as caught:
        load_policy(Config(), str(family_folder), CPU)
    assert_one_sentence(caught.value, f"{name} has shape (7,), by its config.json (")


def test_other_heads_and_old_constants_in_the_files_are_nothing_to_refuse(family_folder):
    """A head of TRL, and what older versions of transformers saved beside the weights."""
    before = load_policy(Config(), str(family_folder), CPU).state_dict()
    layer, _ = LAYER_OF[family_of(family_folder)]
    change_weights(
        family_folder, **{"v_head.summary.weight": torch.ones(1, 8), f"{layer}attn.masked_bias": torch.ones(1)}
    )
    after = load_policy(Config(), str(family_folder), CPU).state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_masks_that_older_versions_saved_are_nothing_to_refuse(tmp_path):
    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "rotary_dim": 4}
    GPTJForCausalLM(GPTJConfig(**sizes)).save_pretrained(tmp_path)
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32), "transformer.h.0.attn.masked_bias": torch.ones(1)}
    change_weights(tmp_path, **masks)
    assert load_language_model(str(tmp_path), "float32", CPU).config.n_layer == 1


@pytest.mark.parametrize("lost", ["", "transformer.wpe.weight"])
def test_a_new_head_may_take_the_place_of_another_and_nothing_else_may_be_new(lost, tmp_path):
    """A classifier of five labels as what one of two begins with; a lost table of positions is no head."""
    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=5)).save_pretrained(tmp_path)
    if not lost:
        return check_two_labels(tmp_path)
    change_weights(tmp_path, **{lost: None})
    with pytest.raises(UsageError, match=r"lacks transformer\.wpe\.weight of a GPT2ForSequenceClassification"):
        check_two_labels(tmp_path)


def check_two_labels(folder: Path) -> None:
    assert new_classifier(Config(), str(folder), {0: "bad", 1: "good"}, PAD, CPU).score.weight.shape == (2, 16)


def test_what_can_be_no_name_of_a_repository_has_no_files():
    assert not has_file("../nope", "config.json") and not has_file("a/b/c", "config.json")


@pytest.mark.parametrize("kind", ["separate", "encoder"])
def test_a_critic_without_one_of_its_weights_is_refused(kind, tmp_path):
    base = tiny_policy("t5" if kind == "encoder" else "gpt2")
    save_policy(base, letter_tokenizer(), tmp_path / "base")
    run = tmp_path / "run"
    save_policy(new_policy(Config(critic=kind, lam=1.0), str(tmp_path / "base"), CPU), letter_tokenizer(), run)
    lost = "block.1.layer.0.SelfAttention.q.weight" if kind == "encoder" else "h.1.attn.c_attn.weight"
    change_weights(run / "critic", **{lost: None})
    with pytest.raises(UsageError) as caught:
        load_policy(Config(), str(run), CPU)
    assert_one_sentence(caught.value, f"{run}/critic lacks ", lost)


def test_an_adapter_without_one_of_its_weights_is_refused(tmp_path):
    save_policy(tiny_policy("gpt2"), letter_tokenizer(), tmp_path / "base")
    save_policy(new_policy(Config(lora_r=2), str(tmp_path / "base"), CPU), letter_tokenizer(), tmp_path / "adapter")
    change_weights(tmp_path / "adapter", "adapter_model.safetensors", **{"h.1.attn.c_attn.lora_B": None})
    with pytest.raises(UsageError, match=r"--peft_model_path .*: it has weights for other layers"):
        load_policy(Config(), str(tmp_path / "adapter"), CPU)


def test_a_new_head_is_put_on_a_whole_trunk_alone(tmp_path):
    save_policy(tiny_policy("gpt2"), letter_tokenizer(), tmp_path)
    assert new_classifier(Config(), str(tmp_path), {0: "bad", 1: "good"}, PAD, CPU).score.weight.shape == (2, 32)
    change_weights(tmp_path, **{"transformer.h.1.ln_1.bias": None})
    with pytest.raises(UsageError, match=r"lacks transformer\.h\.1\.ln_1\.bias of a GPT2ForSequenceClassification"):
        new_classifier(Config(), str(tmp_path), {0: "bad", 1: "good"}, PAD, CPU)


def test_an_adapter_of_a_folder_can_be_loaded_from_another_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    save_policy(tiny_policy("gpt2"), letter_tokenizer(), Path("models/base"))
    policy = new_policy(Config(lora_r=2), "models/base", CPU)
    save_policy(policy, letter_tokenizer(), Path("run"))
    monkeypatch.chdir("elsewhere")
    again = load_policy(Config(), "../run", CPU)
    assert again.state_dict().keys() == policy.state_dict().keys()
    assert load_tokenizer("../run").eos_token_id == EOS
    assert loading.from_anywhere("gpt2") == "gpt2" and loading.from_anywhere(None) is None  # a Hub id stays one


@pytest.mark.parametrize("change", ["a weight of the trunk", "a layer more"])
def test_a_reward_model_without_all_its_weights_is_refused(change, tmp_path):
    classifier = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
        )
    )
    classifier.save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    if change == "a layer more":
        change_config(tmp_path, num_hidden_layers=3)
        lost = "bert.encoder.layer.2."
    else:
        lost = "bert.encoder.layer.1.output.dense.bias"
        change_weights(tmp_path, **{lost: None})
    with pytest.raises(UsageError) as caught:
        load_reward_model(Config(reward_model_path=str(tmp_path)), str(tmp_path), CPU)
    assert_one_sentence(caught.value, f"--reward_model_path {tmp_path} lacks {lost}", "of a BertForSequenceClassif")


@pytest.mark.parametrize("model_type", ["mine", "gpt2"])
def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(model_type, tmp_path, monkeypatch):
    """Where transformers has the family itself, its own code is taken; else the model is refused."""
    save_policy(tiny_policy("gpt2"), letter_tokenizer(), tmp_path)
    (tmp_path / "mine.py").write_text("open('ran', 'w')\nfrom transformers import *\nclass C(GPT2Config): pass\n")
    change_config(tmp_path, model_type=model_type, auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.C"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if model_type == "gpt2":
        assert type(load_language_model(str(tmp_path), "float32", CPU)).__module__.startswith("transformers.models")
    else:
        with pytest.raises(UsageError) as caught:
            load_language_model(str(tmp_path), "float32", CPU)
        assert_one_sentence(caught.value, f"--base_model_name {tmp_path} can only be loaded by running code that comes")
    assert not (tmp_path / "ran").exists()


# ----------------------------------------------------------------------------------------------------------------
# The Hub
# ----------------------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as from_pretrained asks for: someone/NAME is the folder NAME below `root`."""

    root = Path()
    commit = "c" * 40
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        self.asked.append(self.path)
        path = self.path.replace("/resolve/main/", f"/resolve/{self.commit}/")
        about, _, file = path.partition(f"/resolve/{self.commit}/")
        folder = self.root / about.partition("/someone/")[2].split("/")[0]
        body = b""
        if "/api/models/someone/" in about and folder.exists():
            about_it = [] if "/tree/" in about else {"id": "x", "sha": self.commit, "siblings": []}
            body = json.dumps(about_it).encode()
        elif file and (folder / file).is_file():
            body = (folder / file).read_bytes()
        self.send_response(200 if body else 404)
        self.send_header("X-Error-Code", "EntryNotFound" if folder.exists() else "RepoNotFound")
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')  # the cache keeps a file under it
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    do_HEAD = do_GET

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def hub(tmp_path):
    """A Hub on this machine that has the folders in tmp_path, and what it was asked for."""
    own = type("OwnHub", (Hub,), {"root": tmp_path, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), own)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.asked = own.asked
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    close(server)


def close(server: http.server.ThreadingHTTPServer) -> None:
    server.shutdown()
    server.server_close()


def in_a_new_process(code: str, folder: Path, **environment: str) -> str:
    """What the code prints with the loading functions at hand and an empty cache, and without a word of a library's."""
    modules = ("config", "adapters", "loading", "reward_model", "sft")
    code = "import torch\n" + "".join(f"from {module} import *\n" for module in modules) + code
    online = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1"}
    environment = {**os.environ, **online, "PYTHONPATH": str(Path(loading.__file__).parent), **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


NOTHING = """
from transformers import GPT2Config, GPT2LMHeadModel
language_model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2))
for flag, load_it in {
    "base_model_name": load_tokenizer,
    "output_dir": lambda path: load_tokenizer(path, "output_dir"),
    "peft_model_path": lambda path: with_adapter(language_model, path, "base"),
    "reward_model_path": lambda path: load_reward_model(Config(), path, torch.device("cpu")),
}.items():
    try:
        load_it("someone/nothing")
    except UsageError as error:
        print(str(error).removeprefix(f"--{flag} someone/nothing is no folder, and "))
"""


def test_what_cannot_be_reached_is_told_without_a_second_try(hub, tmp_path):
    """The library would announce a second try on standard error."""
    close(hub)
    sentences = in_a_new_process(NOTHING, tmp_path, HF_ENDPOINT=hub.address).splitlines()
    start = f"{hub.address} cannot be reached ("
    assert len(sentences) == 4 and all(sentence.startswith(start) for sentence in sentences)


LETTERS = """
print(load_tokenizer("someone/letters")("abc").input_ids)
policy = load_policy(Config(), "someone/letters", torch.device("cpu"))
new_policy(Config(lora_r=2), "someone/letters", torch.device("cpu"))  # peft has its own way to ask and to warn
print(sum(weight.double().abs().sum() for weight in policy.language_model.parameters()).item())
"""


@pytest.mark.slow
def test_a_model_of_the_hub_is_loaded_and_again_from_its_cache_when_the_hub_is_gone(hub, tmp_path):
    """The Hub is asked once whether it is there, through a proxy if there is one: here that alone knows the address."""
    policy = tiny_policy("gpt2")
    save_policy(policy, letter_tokenizer(), tmp_path / "letters")
    there = {"HF_ENDPOINT": "http://hub.example", "HTTP_PROXY": hub.address, "NO_PROXY": ""}
    ids, total, *missing = in_a_new_process(LETTERS + NOTHING, tmp_path, **there).splitlines()
    assert json.loads(ids) == [2, 3, 4]
    assert float(total) == pytest.approx(sum(p.double().abs().sum().item() for p in policy.language_model.parameters()))
    assert [sentence.split(":")[0] for sentence in missing] == ["no reachable Hub model"] * 4
    assert hub.asked[0] == "http://hub.example/" and hub.asked.count("http://hub.example/") == 1
    close(hub)
    assert in_a_new_process(LETTERS, tmp_path, **there).splitlines() == [ids, total]


def test_a_folder_is_loaded_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("hub.hub_error", lambda: pytest.fail("the Hub is asked"))
    save_policy(tiny_policy("gpt2"), letter_tokenizer(), tmp_path)
    load_tokenizer(str(tmp_path))
    load_policy(Config(), str(tmp_path), CPU)


@pytest.mark.parametrize("family", ["gpt2", "t5", "llama"])
def test_a_tied_embedding_has_a_thin_gradient_of_the_same_numbers(family, tmp_path):
    """Full in the end; none of it for a model that is not tied (llama), or that an adapter stands on."""
    save_policy(tiny_policy(family), letter_tokenizer(), tmp_path)
    gradients = []
    for thin in (True, False):
        model = new_policy(Config(), str(tmp_path), CPU).language_model
        embedding = model.get_input_embeddings()
        assert embedding.sparse == (family != "llama")
        embedding.sparse = embedding.sparse and thin
        model(input_ids=torch.tensor([[3, 4, 3]]), labels=torch.tensor([[4, 3, 5]])).loss.backward()
        gradients.append(embedding.weight.grad)
    assert gradients[0].abs().max() > 1e-3
    thin, full = gradients
    assert_close(thin, full, atol=1e-6)
    assert not new_policy(Config(lora_r=2), str(tmp_path), CPU).language_model.get_input_embeddings().sparse


# ----------------------------------------------------------------------------------------------------------------
# Context
# ----------------------------------------------------------------------------------------------------------------


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TINY |= {"vocab_size": VOCAB, "max_position_embeddings": 20}
LED_SIZE = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
LED_SIZE |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": VOCAB, "attention_window": [4]}
CONTEXTS = {  # configuration, and the most tokens that the model reads
    "gpt2": (GPT2Config(**GPT2_SIZE | {"n_positions": 20}), 20),
    "llama": (LlamaConfig(**TINY), 20),
    "neox": (GPTNeoXConfig(**TINY), 20),
    "bert": (BertConfig(**TINY), 20),
    "roberta": (transformers.RobertaConfig(**TINY, pad_token_id=1), 18),
    "camembert": (transformers.CamembertConfig(**TINY, pad_token_id=1), 18),
    "mpnet": (transformers.MPNetConfig(**TINY, pad_token_id=1), 18),
    "longformer": (transformers.LongformerConfig(**TINY, pad_token_id=1, attention_window=4), 18),
    "esm": (transformers.EsmConfig(**TINY, pad_token_id=1), 18),
    "ibert": (transformers.IBertConfig(**TINY, pad_token_id=1), 18),
    "xlm": (
        transformers.XLMConfig(emb_dim=16, n_layers=1, n_heads=2, n_words=VOCAB, max_position_embeddings=20),
        20,
    ),
    "mpt": (transformers.MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=VOCAB, max_seq_len=20), 20),
    "opt": (transformers.OPTConfig(ffn_dim=16, word_embed_proj_dim=8, **TINY), 20),
    "xlnet": (transformers.XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=16, vocab_size=VOCAB), 10**9),
    "t5": (T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=VOCAB), 10**9),
    "mt5": (MT5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=VOCAB), 10**9),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_context_length(name):
    """-1 and relative positions are no limit; positions that begin behind the padding's index leave fewer."""
    config, expected = CONTEXTS[name]
    assert context_length(transformers.AutoModel.from_config(config)) == expected


@pytest.mark.parametrize("name", ["roberta", "camembert", "mpnet", "longformer", "esm"])
def test_a_model_reads_as_many_tokens_as_its_context_length_says(name):
    """With one token more, the model itself fails."""
    model = transformers.AutoModel.from_config(CONTEXTS[name][0]).eval()
    longest = context_length(model)
    model(torch.full((1, longest), 5), attention_mask=torch.ones(1, longest))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5), attention_mask=torch.ones(1, longest + 1))


def test_encoder_and_decoder_may_read_different_lengths():
    config = transformers.LEDConfig(**LED_SIZE, max_encoder_position_embeddings=20, max_decoder_position_embeddings=10)
    model = transformers.LEDModel(config)
    assert (context_length(model.get_encoder()), context_length(model.get_decoder())) == (20, 10)


# ----------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_load_policy_brings_the_value_head_back(family, tmp_path):
    policy = tiny_policy(family)
    save_policy(policy, letter_tokenizer(), tmp_path)
    loaded = load_policy(Config(), str(tmp_path), CPU)
    for (name, saved), (other, restored) in zip(policy.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(saved, restored)
    assert loaded.is_encoder_decoder == policy.is_encoder_decoder
    assert load_tokenizer(str(tmp_path))("abc").input_ids == [2, 3, 4]


def test_a_model_without_a_saved_value_head_starts_with_a_zero_one(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    loaded = load_policy(Config(), str(tmp_path), CPU)
    assert torch.equal(loaded.value_head.weight, torch.zeros(1, 32))
    assert torch.equal(loaded.value_head.bias, torch.zeros(1))


def test_the_value_head_is_a_file_beside_the_model_not_a_part_of_it(tmp_path):
    save_policy(tiny_policy("gpt2"), letter_tokenizer(), tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.json", "value_head.safetensors"} <= {
        file.name for file in tmp_path.iterdir()
    }
    header = (tmp_path / "value_head.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    assert set(json.loads(header[8 : 8 + size])) - {"__metadata__"} == {"weight", "bias"}
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["GPT2LMHeadModel"]


def test_loaded_weights_can_be_trained(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    policy = load_policy(Config(), str(tmp_path), CPU)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in policy.parameters())


@pytest.mark.parametrize(
    "model",
    [tiny_gpt2(activation_function="gelu_new"), tiny_t5(feed_forward_proj="gated-gelu")],
    ids=["gpt2", "flan-t5"],
)
def test_the_fused_activation_is_the_same_function(model, tmp_path):
    """The logits stay, and the activation is one module, not a chain of products and powers."""
    model.eval().save_pretrained(tmp_path)
    fused = load_language_model(str(tmp_path), "float32", torch.device("cpu")).eval()
    names = [[type(module).__name__ for module in one.modules()] for one in (model, fused)]
    assert names[0].count("NewGELUActivation") == names[1].count("GELUTanh") > 0
    assert "NewGELUActivation" not in names[1]
    ids = torch.tensor([[2, 3, 4, 5]])
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    assert_close(fused(**inputs).logits, model(**inputs).logits, atol=3e-5)


def test_dropout_is_off_the_activation_fused_and_the_rest_left():
    config = prepare_config(GPT2Config(resid_pdrop=0.3, embd_pdrop=0.2, attn_pdrop=0.1, summary_first_dropout=0.4))
    rates = (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop, config.summary_first_dropout)
    assert rates == (0.0, 0.0, 0.0, 0.0)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
    assert config.to_dict() == GPT2Config(activation_function="gelu_pytorch_tanh", **none).to_dict()
    assert prepare_config(GPT2Config(activation_function="relu")).activation_function == "relu"
    for other, names in (
        (T5Config(dropout_rate=0.3, classifier_dropout=0.2), ["dropout_rate", "classifier_dropout"]),
        (LlamaConfig(attention_dropout=0.3), ["attention_dropout"]),
        (BertConfig(hidden_dropout_prob=0.3), ["hidden_dropout_prob", "attention_probs_dropout_prob"]),
    ):
        assert [getattr(prepare_config(other), name) for name in names] == [0.0] * len(names)


def test_preparing_reaches_the_configurations_inside_a_configuration():
    parts = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(hidden_dropout_prob=0.3), BertConfig(attention_probs_dropout_prob=0.2)
    )
    prepare_config(parts)
    assert parts.encoder.hidden_dropout_prob == parts.decoder.attention_probs_dropout_prob == 0.0


def test_a_new_language_model_has_the_configured_size(tokenizer):
    config = Config(vocab_size=300, context_length=48, n_layer=3, n_embd=24, n_head=2)
    torch.manual_seed(0)
    model = new_language_model(config, tokenizer)
    assert len(model.transformer.h) == 3
    assert model.transformer.wte.weight.shape == (280, 24)
    assert model.transformer.wpe.weight.shape == (48, 24)
    assert context_length(model) == 48
    assert model.config.n_head == 2
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    model.train()
    ids = torch.tensor([tokenizer("the film was good").input_ids])
    assert torch.equal(model(ids).logits, model(ids).logits)  # no dropout


def test_a_damaged_value_head_is_refused_in_one_sentence(tmp_path):
    policy = tiny_policy("gpt2")
    save_policy(policy, letter_tokenizer(), tmp_path)
    (tmp_path / "value_head.safetensors").write_bytes(b"no weights")
    with pytest.raises(UsageError, match=r"value_head\.safetensors is no value head of this model") as refusal:
        load_policy(Config(), str(tmp_path), CPU)
    assert "\n" not in str(refusal.value)
