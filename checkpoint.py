"""A run's state on the disk: saved now and then, and taken up again, to the bit.

A checkpoint is all that training has changed (`State`), and what tells whether it is gone on from with the models and
the data that it began with. Every random number is a function of the seed and of the update's number, so that there is
no generator's state in it; weights that do not train are loaded again from where they came, and compared by a hash.

    checkpoints/step_12/weights.safetensors      what trains: policy, value head, critic
                        exp_avg.safetensors      Adam's moments, under the weights' names
                        exp_avg_sq.safetensors
                        best.safetensors         the best held-out policy so far, with --eval_every
                        state.json               the numbers, and how far the log had come
                        manifest.json            size and hash of each of them
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

import ppo
from config import Config, RunError, UsageError
from files import MANIFEST, damage, described_files, read_object, whole_folder, write_whole
from model import PolicyModel
from train import Best, State

ADAM = ("exp_avg", "exp_avg_sq")  # the moments of a gradient, as torch calls them
BYTES_A_SECOND = 2e8  # of a slow disk, by which the first save is expected to take so long
SAVES_COST = 0.01  # share of the time that saves take if --save_every says nothing, but for the last


class Began(NamedTuple):
    """What must be the same whenever a run goes on, and is no setting."""

    reference: str  # a hash of all weights that it was held to
    n_prompts: int | None  # the most rows that prompts were taken from; None: all
    matmul_precision: str  # as measured then, where the setting is `auto`


def parameters_hash(model: torch.nn.Module) -> str:
    """One hash for all of a model's parameters, be they trained or not, with their names."""
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        total.update(name.encode())
        total.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def trained_weights(policy: PolicyModel) -> dict[str, torch.nn.Parameter]:
    """The parameters that an update changes, by name, in the optimizer's order."""
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def adam_state(state: State) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, float]]:
    """Adam's two moments by name, and how many steps each weight has had; of a weight without a step, nothing."""
    moments = {moment: {} for moment in ADAM}
    steps = {}
    for name, parameter in trained_weights(state.policy).items():
        own = state.optimizer.state.get(parameter)
        if own:
            steps[name] = own["step"].item()
            for moment in ADAM:
                moments[moment][name] = own[moment]
    return moments, steps


def n_bytes(state: State) -> int:
    """What a checkpoint takes on the disk, but for a few numbers."""
    copies = 1 + len(ADAM) + bool(state.best)
    return copies * sum(weight.nbytes for weight in trained_weights(state.policy).values())


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def save_state(state: State, began: Began, log_bytes: int, run: Path, keep: int) -> None:
    """Write the state into the run's checkpoints/step_N, N being the updates that are done, and remove what is older
    than the newest `keep`; `log_bytes` is the size of training_log.csv.

    Raises RunError if it cannot be written; then those before it are as they were.
    """
    checkpoints = run / "checkpoints"
    moments, steps = adam_state(state)
    numbers = {
        "next_update": state.next_update,
        "kl_coef": state.kl_coef,
        "moments": state.moments._asdict(),
        "idle_updates": state.idle_updates,
        "best": {"reward": state.best.reward, "update": state.best.update} if state.best else None,
        "adam_steps": steps,
        "log_bytes": log_bytes,
        "began": began._asdict(),
    }
    with whole_folder(checkpoints / f"step_{state.next_update}", replaces=".") as scratch:
        save_tensors(scratch / "weights.safetensors", trained_weights(state.policy))
        for moment, tensors in moments.items():
            save_tensors(scratch / f"{moment}.safetensors", tensors)
        if state.best:
            save_tensors(scratch / "best.safetensors", state.best.weights)
        write_whole(scratch / "state.json", json.dumps(numbers, indent=2))
        write_whole(scratch / MANIFEST, json.dumps({"files": described_files(scratch)}, indent=2))
    remove_outdated(run, state.next_update, keep)


def remove_outdated(run: Path, n_updates: int, keep: int) -> None:
    """Remove a run's checkpoints but for the newest `keep`, once there is one after n_updates.

    One after more than that is damaged, or it would have been gone on from.
    """
    found = in_order(run)
    own = [path for path in found if number_of(path) <= n_updates]
    for path in found:
        if path not in own[:keep]:
            shutil.rmtree(path, ignore_errors=True)


def number_of(checkpoint: Path) -> int:
    """How many updates were done when it was made."""
    return int(checkpoint.name.removeprefix("step_"))


def in_order(run: Path) -> list[Path]:
    """A run's checkpoints, be they whole or not, from the newest to the oldest."""
    found = [path for path in (run / "checkpoints").glob("step_*") if path.name.removeprefix("step_").isdecimal()]
    return sorted(found, key=number_of, reverse=True)


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that is as it was written; None where there is none at all. Others are named.

    Raises RunError if there are some, all of them damaged.
    """
    found = in_order(run)
    for path in found:
        problem = damage(path)
        if not problem:
            return path
        print(f"note: {path} is damaged and not used: {problem}")
    if found:
        raise RunError(f"no checkpoint of {run} is whole; nothing was changed there: begin again in another folder")
    return None


def newest_before(run: Path, n_updates: int) -> Path | None:
    """The newest whole checkpoint that was made when at most so many updates were done; None where there is none."""
    found = (path for path in in_order(run) if number_of(path) <= n_updates)
    return next((path for path in found if not damage(path)), None)


def read_numbers(checkpoint: Path) -> dict:
    """What its state.json holds, the parts of it in the types of ours."""
    numbers = read_object(checkpoint / "state.json")
    numbers["moments"] = ppo.Moments(**numbers["moments"])
    numbers["began"] = Began(**numbers["began"])
    return numbers


@torch.no_grad()
def restore(state: State, checkpoint: Path, config: Config) -> None:
    """Bring the state of a new run to where the checkpoint was. Raises UsageError if that is of other weights, or of
    more updates than are asked for.
    """
    numbers = read_numbers(checkpoint)
    if numbers["next_update"] > config.n_updates:
        raise UsageError(
            f"--n_updates {config.n_updates} is less than the {numbers['next_update']} that {checkpoint.parents[1]} "
            "has done"
        )
    weights = load_file(checkpoint / "weights.safetensors")
    moments = {moment: load_file(checkpoint / f"{moment}.safetensors") for moment in ADAM}
    trained = trained_weights(state.policy)
    if {name: weight.shape for name, weight in weights.items()} != {name: own.shape for name, own in trained.items()}:
        raise UsageError(f"{checkpoint} holds other weights than those that train here")
    optimizer_state = {}
    for number, (name, parameter) in enumerate(trained.items()):
        parameter.copy_(weights[name])
        if name in numbers["adam_steps"]:
            own = {moment: moments[moment][name] for moment in ADAM}
            optimizer_state[number] = own | {"step": torch.tensor(numbers["adam_steps"][name])}
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
    state.kl_coef = numbers["kl_coef"]
    state.moments = numbers["moments"]
    state.next_update = numbers["next_update"]
    state.idle_updates = numbers["idle_updates"]
    if numbers["best"]:
        best_weights = load_file(checkpoint / "best.safetensors", device=str(state.policy.device))
        state.best = Best(**numbers["best"], weights=best_weights)


def check_reference(reference: torch.nn.Module, began: Began, run: Path) -> None:
    """Raise UsageError unless the reference has the weights that the run began with."""
    if parameters_hash(reference) != began.reference:
        raise UsageError(
            f"the model that {run} began with is another one now, and so would be what the policy is held to"
        )


def is_time_to_save(config: Config, n_updates: int, since: float, cost: float) -> bool:
    """Every --save_every updates; or as often as saves of `cost` seconds take SAVES_COST of the time, `since` the last
    one; and after the last update.
    """
    if not config.keep_checkpoints:
        return False
    if n_updates == config.n_updates:
        return True
    if config.save_every:
        return n_updates % config.save_every == 0
    return cost < SAVES_COST * since
