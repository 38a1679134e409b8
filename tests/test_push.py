"""What is made goes to the Hub where that is asked for, and nothing else; what cannot be is refused before any work."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants
from micro import PPO, assert_refused, flags, last_line_of_errors, listing, run_main
from stand_in_hub import TOKEN, Hub, served

import hub as hub_reading
import push as pushing
from arguments import is_read
from config import TASKS, Config

pytest_plugins = ["micro"]
pytestmark = pytest.mark.usefixtures("no_figures")
MODEL = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
MODEL |= {"tokenizer.json", "tokenizer_config.json", "manifest.json"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, in which `me` is logged in."""
    here = Hub()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with served(here):
        monkeypatch.setattr(constants, "ENDPOINT", here.endpoint)
        hub_reading.hub_error.cache_clear()
        yield here
    close_session()
    hub_reading.hub_error.cache_clear()


def train(*more, **changes) -> list[str]:
    return ["--task", "train", *flags(**changes), "--push_to_hub", *more]


def sent(hub: Hub, repo: str) -> dict[str, bytes]:
    return {name: data for name, data in hub.repositories[repo].items() if name != ".gitattributes"}


# --------------------------------------------------------------------------------------------------------------------
# What is uploaded
# --------------------------------------------------------------------------------------------------------------------


def test_the_result_is_uploaded_as_it_is_into_a_private_repository(hub, workplace, capsys):
    """Policy, tokenizer, value head, manifest, card; not the state of the run, its logs or its settings."""
    assert run_main(*train("mine")) == 0
    folder = workplace / "saved_models/tiny/ppo-2"
    assert set(sent(hub, "me/mine")) == MODEL | {"value_head.safetensors"}
    for name, data in sent(hub, "me/mine").items():
        assert (folder / name).read_bytes() == data, name
    assert hub.private == {"me/mine"}
    assert capsys.readouterr().out.endswith(f"uploaded: {hub.endpoint}/me/mine\n")
    before = listing(workplace)
    assert run_main("--task", "generate", "--output_dir", str(folder), "--prompt", "A") == 0
    assert listing(workplace) == before and len(hub.repositories) == 1


def test_stages_are_uploaded_by_themselves_into_the_users_organisation(hub, workplace):
    assert run_main("--task", "sft", "--push_to_hub", "us/language", "--output_dir", "a", *flags()) == 0
    assert run_main("--task", "reward", "--push_to_hub", "reward", "--output_dir", "b", *flags()) == 0
    assert set(sent(hub, "us/language")) == MODEL
    assert set(sent(hub, "me/reward")) == MODEL - {"generation_config.json"} | {"plots/reliability.png"}
    for repo, folder in (("us/language", "a"), ("me/reward", "b")):
        for name, data in sent(hub, repo).items():
            assert (workplace / folder / name).read_bytes() == data, name


def test_an_empty_repository_is_filled_as_it_is(hub, workplace):
    """One that its owner has made public stays so."""
    hub.repositories["me/mine"] = {".gitattributes": b""}
    assert run_main("--task", "sft", "--push_to_hub", "me/mine", "--output_dir", "a", *flags()) == 0
    assert set(sent(hub, "me/mine")) == MODEL and not hub.private


def test_only_what_a_run_has_made_is_uploaded(tmp_path):
    """Whatever else lies in its folder."""
    named = (
        "manifest.json",
        "README.md",
        "config.json",
        "critic/model.safetensors",
        "plots/training.png",
        "plots/runs.png",
    )
    for name in (
        *named,
        "run_config.json",
        "rows.txt",
        "training_log.csv",
        "notes.txt",
        "wandb/key",
        "checkpoints/x.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "manifest.json").write_text(json.dumps({"sha256": {"config.json": "", "critic/model.safetensors": ""}}))
    expected = ["README.md", "config.json", "critic/model.safetensors", "manifest.json", "plots/training.png"]
    assert pushing.public_files(tmp_path) == expected


def test_the_tasks_that_make_something_upload_it():
    spec = Config.__dataclass_fields__["push_to_hub"]
    assert [task for task in TASKS if is_read(spec, task)] == ["train", "sft", "reward"]


# --------------------------------------------------------------------------------------------------------------------
# What is refused before any work
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a b", "a/b/c", "a.", "a..b", "me/"])
def test_what_can_name_no_repository_is_refused(name, hub, workplace, capsys):
    assert_refused(capsys, workplace, train(name), f"--push_to_hub {name!r} can name no repository, expected NAME or")
    assert hub.requests == []


def test_nobody_who_is_not_logged_in_begins(hub, workplace, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    words = f"--push_to_hub mine: nobody is logged in to {hub.endpoint}; run `hf auth login`, or set HF_TOKEN"
    for task in ("train", "sft", "reward"):
        assert_refused(
            capsys, workplace, ["--task", task, "--push_to_hub", "mine", "--output_dir", "a", *flags()], words
        )


def test_a_token_that_is_not_known_is_refused(hub, workplace, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert_refused(capsys, workplace, train("mine"), "--push_to_hub mine cannot be used: Invalid user token")


def test_a_token_that_may_only_read_is_refused(hub, workplace, capsys):
    hub.user["auth"]["accessToken"]["role"] = "read"
    assert_refused(
        capsys, workplace, train("mine"), "--push_to_hub mine: me is logged in with a token that may only read"
    )


@pytest.mark.parametrize("owner", ["you", "readers"])
def test_a_place_of_others_is_refused_with_those_that_can_be(owner, hub, workplace, capsys):
    words = "me is logged in, who may not write there; expected one of me/mine, us/mine"
    assert_refused(capsys, workplace, train(f"{owner}/mine"), f"--push_to_hub {owner}/mine: {words}")


def test_a_repository_that_holds_something_is_refused(hub, workplace, capsys):
    hub.repositories["me/mine"] = {".gitattributes": b"", "model.safetensors": b"mine", "x": b""}
    words = "--push_to_hub me/mine holds model.safetensors and 1 other files already; name a new repository"
    assert_refused(capsys, workplace, train("mine"), words)
    assert hub.repositories["me/mine"]["model.safetensors"] == b"mine"


def test_no_hub_is_told_at_once(hub, workplace, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = f"--push_to_hub mine: {hub.endpoint} cannot be reached ("
    assert_refused(capsys, workplace, train("mine"), words)
    assert hub.requests == []


def test_an_adapter_of_a_model_that_nobody_else_has_is_refused(hub, workplace, capsys):
    """Its settings would name a folder of this disk; a whole model names none."""
    adapter = ["--base_model_name", "saved_models/tiny/sft", "--max_prompt_length", "12", "--lora_r", "2"]
    adapter += ["--reward_model_path", "saved_models/tiny/reward"]
    words = (
        "--push_to_hub mine would get an adapter of saved_models/tiny/sft, a folder that nobody else has: expected --m"
    )
    assert_refused(capsys, workplace, [*train("mine"), *adapter], words)
    assert run_main(*train("mine"), *adapter, "--merge") == 0
    assert set(sent(hub, "me/mine")) == MODEL | {"value_head.safetensors"}
    assert not [name for name, data in sent(hub, "me/mine").items() if str(workplace).encode() in data]


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ({"task": "reward", "base_model_name": "here", "lora_r": 2}, ""),  # it is folded in
        ({"task": "reward", "base_model_name": "here", "lora_r": 2, "load_in_8bit": True, "merge": True}, "here"),
        ({"task": "reward", "base_model_name": "here", "lora_r": 2, "dtype": "bfloat16"}, "here"),
        ({"task": "train", "base_model_name": "gpt2", "lora_r": 2, "sft_first": True}, "gpt2"),
        ({"task": "train", "base_model_name": "gpt2", "lora_r": 2, "merge": True}, ""),
        ({"task": "train", "base_model_name": "gpt2"}, ""),
        ({"task": "train", "base_model_name": "here", "sft_first": True}, ""),
        ({"task": "train", "preset": "tiny", "lora_r": 2}, "saved_models/tiny/sft"),
        ({"task": "sft", "lora_r": 2}, ""),  # made from nothing, it is trained whole
    ],
)
def test_an_adapter_is_what_the_task_will_save(settings, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    config = Config(**settings)
    first = config.base_model_name
    if config.task == "train" and (config.sft_first or not first):
        first = str(config.run_folder / "sft")
    assert pushing.adapted_base(config, first) == base


def test_a_dry_run_asks_and_leaves_nothing(hub, workplace):
    before = listing(workplace)
    assert run_main(*train("mine"), "--dry_run") == 0
    assert listing(workplace) == before and hub.repositories == {}
    assert {request.split()[0] for request in hub.requests} <= {"HEAD", "GET"} and hub.requests


# --------------------------------------------------------------------------------------------------------------------
# What fails, and what is not asked for
# --------------------------------------------------------------------------------------------------------------------


def test_an_upload_that_fails_leaves_the_run_and_says_how_it_is_done_again(hub, workplace, capsys):
    """The command does it: the library's own, in a process of its own."""
    hub.fails_at = "/commit/"
    assert run_main(*train("mine")) == 1
    message = last_line_of_errors(capsys)
    folder = "saved_models/tiny/ppo-2"
    assert message.startswith(f"error: {folder} is done, and its upload failed (403 Forbidden: not for you.)")
    assert (workplace / folder / "training_stats.json").exists() and (workplace / folder / "README.md").exists()
    hub.fails_at = ""
    program, *arguments = shlex.split(message.split("; try again: ")[1])
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(sent(hub, "me/mine")) == MODEL | {"value_head.safetensors"}
    assert all((workplace / folder / name).read_bytes() == data for name, data in sent(hub, "me/mine").items())


def test_a_repository_that_was_filled_meanwhile_is_left_alone(hub, workplace, monkeypatch, capsys):
    real = pushing.check_is_empty

    def filled_after_the_first_look(repo: str) -> None:
        real(repo)
        hub.repositories["me/mine"] = {"model.safetensors": b"another's"}

    monkeypatch.setattr(pushing, "check_is_empty", filled_after_the_first_look)
    monkeypatch.setattr("run.run_ppo", lambda *_: monkeypatch.setattr(pushing, "check_is_empty", real))
    shutil.copytree(workplace / PPO, workplace / "saved_models/tiny/ppo-2")
    monkeypatch.setattr("main.new_ppo_folder", lambda config: Path("saved_models/tiny/ppo-2"))
    assert run_main(*train("mine")) == 1
    assert "its upload failed (--push_to_hub me/mine holds model.safetensors already" in last_line_of_errors(capsys)
    assert hub.repositories["me/mine"] == {"model.safetensors": b"another's"}


def test_a_run_that_goes_on_is_uploaded_only_where_that_is_asked_for_again(hub, workplace, capsys):
    """Its settings may be anybody's."""
    path = workplace / PPO / "run_config.json"
    path.write_text(path.read_text().replace('"push_to_hub": ""', '"push_to_hub": "theirs"'))
    more = ["--task", "train", "--resume", "--output_dir", str(PPO), "--n_updates"]
    assert run_main(*more, "3") == 0
    note = f"note: --push_to_hub theirs of {PPO} has to be given again with --resume, if it is wanted still"
    assert note in capsys.readouterr().err and hub.requests == []
    assert run_main(*more, "4", "--push_to_hub", "mine") == 0
    assert list(hub.repositories) == ["me/mine"]
