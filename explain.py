"""The `explain` task: a look inside one update, token by token, with every number that PPO has for a response.

Nothing is computed here that training computes: the rollout and the update are `train.train`'s own, the course of its
epochs is `train.update` with fewer of them, and every number of a token comes from the function of ppo.py that trains.
What an update did is seen from copies of the state before it, which is left as it was.

    scene       the state before the update, and what it is trained with: of a model, of a run's policy, or of a run as
                it was at one of its updates
    course      an update's rollout, and what the policy made of its tokens before the update and after each epoch
    trace       one dict of texts and numbers, that tables.py prints and page.py draws: `trace_of` says what is in it
"""

import ast
import copy
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

import ppo
import train as training
from ask import check_is_text, check_new_file, named_rows
from config import NO_UPDATE, Config, UsageError
from files import whole_lines, write_whole
from folders import STATS
from model import PolicyModel, TokenOutputs, is_frozen, score_in_passes
from page import known_to_json, write_page
from progress import progress
from prompts import Prompt
from report import log_row
from scenes import Scene, compared_with_log, planned_updates, scene_of
from tables import is_coloured, text_of
from train import Fixed, Rollout, State, learning_rate, shuffled_steps, train, update

KINDS = (".html", ".json")  # of files that a trace is written to


# --------------------------------------------------------------------------------------------------------------------
# An update's course
# --------------------------------------------------------------------------------------------------------------------


class Course(NamedTuple):
    """An update as it went: its rollout, and the policy's numbers for the rollout's tokens, epoch by epoch."""

    rollout: Rollout
    outputs: list[TokenOutputs]  # before the update, and after each of its epochs
    updates: list[dict[str, float]]  # the statistics of `train.update` with one epoch, with two, ..., with all
    after: State
    n_steps: int  # of the optimizer, that were taken


def copied(state: State) -> State:
    """A copy that can be trained without the state's moving; modules with nothing to train are shared."""
    shared = {id(module): module for module in state.policy.modules() if is_frozen(module)}
    return copy.deepcopy(state, shared)


def steps_of(state: State) -> int:
    """How many steps Adam has taken."""
    return int(max((own["step"] for own in state.optimizer.state.values()), default=0))


def scored(policy: PolicyModel, rollout: Rollout, config: Config) -> TokenOutputs:
    """The rollout's tokens by the function, and in the passes, that scored them when they were sampled."""
    return score_in_passes(
        policy,
        query_ids=rollout.query_ids,
        query_mask=rollout.query_mask,
        response_ids=rollout.response_ids,
        response_mask=rollout.mask,
        mini_batch_size=config.mini_batch_size,
        temperature=config.temperature,
        with_entropy=config.entropy_coef > 0,
    )


def course_of(
    state: State,
    fixed: Fixed,
    prompts: Sequence[Prompt],
    config: Config,
    advance: Callable[[dict, int], None] = lambda numbers, count: None,
) -> Course:
    """The state's next update, which leaves the state as it is; `advance` is told of the epochs that are done.

    The order of an epoch's rows is a function of the seed and the epoch's number, so that an update of k epochs is the
    first k epochs of a longer one. With `target_kl` it may take no step in the last of them, which are then left out.
    """
    after = copied(state)
    rollout, stats = next(train(after, fixed, prompts, config))
    outputs = [TokenOutputs(logprobs=rollout.logprobs, values=rollout.values, entropy=rollout.entropy)]
    updates = []
    for n_epochs in range(1, config.ppo_epochs + 1):
        part, numbers = after, stats
        if n_epochs < config.ppo_epochs:
            part, shorter = copied(state), replace(config, ppo_epochs=n_epochs)
            numbers = update(part.policy, part.optimizer, rollout, shorter, state.next_update)
        new = scored(part.policy, rollout, config)
        advance({}, n_epochs)
        if config.target_kl and updates and torch.equal(new.logprobs, outputs[-1].logprobs):
            updates[-1] = stats  # they count the step that was not taken
            break
        outputs.append(new)
        updates.append(numbers)
    return Course(rollout, outputs, updates, after, steps_of(after) - steps_of(state))


# --------------------------------------------------------------------------------------------------------------------
# Every number of a token
# --------------------------------------------------------------------------------------------------------------------


def rollout_numbers(rollout: Rollout, kl_coef: float, config: Config) -> dict[str, torch.Tensor]:
    """What a rollout has of every token, (batch, time) each, under the names of the trace."""
    given = {"rewards": rollout.rewards, "values": rollout.values, "mask": rollout.mask, "gamma": config.gamma}
    no_kl, no_scores = torch.zeros_like(rollout.kl), torch.zeros_like(rollout.scores)
    return {
        "logprob": rollout.logprobs,
        "ref_logprob": rollout.ref_logprobs,
        "kl": rollout.kl,
        "entropy": rollout.entropy,
        "value": rollout.values,
        "reward_kl": ppo.shape_rewards(scores=no_scores, kl=rollout.kl, mask=rollout.mask, kl_coef=kl_coef),
        "reward_score": ppo.shape_rewards(scores=rollout.scores, kl=no_kl, mask=rollout.mask, kl_coef=kl_coef),
        "reward": rollout.rewards,
        "td_error": ppo.estimate_advantages(**given, lam=0.0),
        "advantage": ppo.estimate_advantages(**given, lam=config.lam),
        "whitened": rollout.advantages,
        "return": rollout.returns,
    }


def epoch_numbers(rollout: Rollout, new: TokenOutputs, config: Config) -> dict[str, torch.Tensor]:
    """What the update makes of every token once the policy gives it the `new` numbers, (batch, time) each."""
    mask, advantages, eps = rollout.mask, rollout.advantages, config.clip_range_value
    ratio = ppo.importance_ratio(logprobs=new.logprobs, old_logprobs=rollout.logprobs, mask=mask)
    losses, is_clipped = ppo.policy_losses(ratio=ratio, advantages=advantages, mask=mask, clip_range=config.clip_range)
    value_losses, value_is_clipped = ppo.value_losses(
        values=new.values, old_values=rollout.values, returns=rollout.returns, mask=mask, clip_range_value=eps
    )
    return {
        "logprob": new.logprobs,
        "ratio": ratio,
        "unclipped": -ratio * advantages,
        "clipped": -ratio.clamp(1 - config.clip_range, 1 + config.clip_range) * advantages,
        "policy_loss": losses,
        "is_clipped": is_clipped,
        "share": losses / mask.sum(),
        "value": new.values,
        "value_near_old": new.values.clamp(rollout.values - eps, rollout.values + eps),
        "value_loss": value_losses,
        "value_is_clipped": value_is_clipped,
        "value_change": new.values - rollout.values,
    } | ({"entropy": new.entropy} if config.entropy_coef > 0 else {})


def batch_numbers(rollout: Rollout, new: TokenOutputs, numbers: dict[str, torch.Tensor]) -> dict[str, float]:
    """The means over all tokens of the batch, and the ratio's extremes, with the policy as it is then."""
    mask = rollout.mask
    kl = ppo.kl_estimate(logprobs=rollout.logprobs, other_logprobs=new.logprobs, mask=mask, estimator="k3")
    means = {"kl_k3": kl, "clip_fraction": numbers["is_clipped"], "value_clip_fraction": numbers["value_is_clipped"]}
    means |= {name: numbers[name] for name in ("policy_loss", "value_loss", "ratio")}
    means["value_error"] = (new.values - rollout.returns).abs()
    found = {name: ppo.masked_mean(values, mask).item() for name, values in means.items()}
    ratios = numbers["ratio"][mask]
    return found | {"ratio_min": ratios.min().item(), "ratio_max": ratios.max().item()}


def scores_of(course: Course, config: Config) -> dict:
    """What `ppo.shape_scores` makes of the scores, all less the penalty for a missing end: the moments by which it
    scales them, of the run so far or of the batch, if it does, and where it clips.
    """
    rollout, moments = course.rollout, course.after.moments
    penalised = ppo.penalise_missing_eos(rollout.raw_scores, rollout.has_eos, config.missing_eos_penalty)
    scale = None
    if config.normalize_scores:
        variance = moments.squares / max(moments.count - 1, 1)
        scale = {"over": "run", "mean": moments.mean, "variance": variance, "n_scores": moments.count}
    if config.whiten_scores:
        mean = penalised.mean()
        variance = ((penalised - mean) ** 2).mean().item()
        scale = {"over": "batch", "mean": mean.item(), "variance": variance, "n_scores": len(penalised)}
    return {"penalised": penalised.tolist(), "scale": scale, "clip": config.score_clip or None}


def whitening_of(rollout: Rollout, advantages: torch.Tensor) -> dict[str, float]:
    """The mean, the variance and the number of the advantages that `ppo.masked_whiten` has made one scale of."""
    mean = ppo.masked_mean(advantages, rollout.mask)
    variance = ppo.masked_mean((advantages - mean) ** 2, rollout.mask)
    return {"mean": mean.item(), "variance": variance.item(), "n_tokens": int(rollout.mask.sum())}


# --------------------------------------------------------------------------------------------------------------------
# Equations
# --------------------------------------------------------------------------------------------------------------------


EQUATIONS = {  # functions, with the symbol of what they compute, and where it is from
    ppo.token_logprobs: ("log π(y_t)", ""),
    ppo.token_entropy: ("H_t", ""),
    ppo.penalise_missing_eos: ("s", ""),
    ppo.shape_scores: ("s", ""),
    ppo.kl_estimate: ("k_t", "Schulman 2020, Approximating KL Divergence"),
    ppo.shape_rewards: ("r_t", "Ziegler et al. 2019, eq. 2, spread over the tokens"),
    ppo.estimate_advantages: ("Â_t", "GAE, eq. 16"),
    ppo.masked_whiten: ("Â_t, whitened", ""),
    ppo.estimate_returns: ("R_t", "GAE, eq. 28, where λ = 1"),
    ppo.importance_ratio: ("q_t", "PPO, section 3"),
    ppo.policy_losses: ("L^CLIP", "PPO, eq. 7"),
    ppo.value_losses: ("L^VF", "departs from PPO, eq. 9"),
    ppo.masked_mean: ("mean over tokens", ""),
    training.minibatch_loss: ("L", "PPO, eq. 9"),
}


def equations() -> list[dict]:
    """The functions that compute a token's numbers: what each is called, where it is, and its lines of code."""
    found = []
    for function, (symbol, paper) in EQUATIONS.items():
        line, source = working_lines(function)
        file = f"{function.__module__}.py"
        found.append({"name": function.__name__, "symbol": symbol, "paper": paper} | {"file": file, "line": line})
        found[-1]["source"] = source
    return found


def working_lines(function: Callable) -> tuple[int, str]:
    """The number of the first of a function's lines that compute something, and these lines: without its signature, its
    docstring, and what it refuses.
    """
    lines, start = inspect.getsourcelines(function)
    statements = ast.parse("".join(lines)).body[0].body[1:]
    while isinstance(statements[0], ast.If) and isinstance(statements[0].body[0], ast.Raise):
        statements = statements[1:]
    first = statements[0].lineno
    return start + first - 1, inspect.cleandoc("\n" + "".join(lines[first - 1 :]))


# --------------------------------------------------------------------------------------------------------------------
# The trace
# --------------------------------------------------------------------------------------------------------------------


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token alone as text, the space before it included; a special one by its name."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    begins_a_word = str(tokenizer.convert_ids_to_tokens(token)).startswith("▁") and not text.startswith(" ")
    return " " + text if begins_a_word else text


def branch(ratio: float, is_clipped: bool) -> str:
    """Which term of the clipped surrogate counts."""
    if not is_clipped:
        return "unclipped"
    return "clipped above" if ratio > 1 else "clipped below"


def per_token(numbers: dict[str, torch.Tensor], row: int, length: int) -> list[dict]:
    """A row's numbers, token by token."""
    columns = {name: values[row, :length].tolist() for name, values in numbers.items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def row_trace(
    course: Course, tokenizer: PreTrainedTokenizerBase, row: int, rolled: dict, epochs: list[dict[str, torch.Tensor]]
) -> dict:
    """One response, with its tokens and what each epoch made of them."""
    rollout = course.rollout
    length = int(rollout.mask[row].sum())
    ids = rollout.response_ids[row, :length].tolist()
    shown = []
    for numbers in epochs:
        tokens = per_token(numbers, row, length)
        shown.append({"tokens": [each | {"branch": branch(each["ratio"], each["is_clipped"])} for each in tokens]})
    numbered = zip(ids, per_token(rolled, row, length), strict=True)
    return {
        "row": row,
        "prompt": rollout.prompts[row].text,
        "response": rollout.texts[row],
        "has_eos": bool(rollout.has_eos[row]),
        "raw_score": rollout.raw_scores[row].item(),
        "score": rollout.scores[row].item(),
        "terms": {name: scores[row].item() for name, scores in rollout.term_scores.items()},
        "tokens": [{"id": token, "text": token_text(tokenizer, token)} | values for token, values in numbered],
        "epochs": shown,
    }


def raw_rows(rollout: Rollout) -> list[dict]:
    """Of each response of the batch what models and reward said, from which all else follows, whitening too."""
    columns = {"logprob": rollout.logprobs, "ref_logprob": rollout.ref_logprobs, "value": rollout.values}
    rows = []
    for row, mask in enumerate(rollout.mask):
        tokens = {name: values[row][mask].tolist() for name, values in columns.items()}
        rows.append({"score": rollout.scores[row].item()} | tokens)
    return rows


SETTINGS = (
    "gamma lam clip_range clip_range_value value_coef entropy_coef temperature kl_estimator whiten_advantages "
    "missing_eos_penalty ppo_epochs mini_batch_size gradient_accumulation_steps max_grad_norm target_kl"
)


def trace_of(
    course: Course, tokenizer: PreTrainedTokenizerBase, config: Config, number: int, rows: Sequence[int], **told: str
) -> dict:
    """Everything of an update and of some of its responses, as texts, numbers, lists and dicts: what JSON can hold.

    `told` are the texts `title`, `model` and `note`. A row has its `tokens`, with what the rollout has of each, and
    `epochs`, from before the update (0) to after its last epoch; `updates` are the statistics of the update up to each.
    """
    rollout = course.rollout
    kl_coef = course.updates[-1]["kl_coef"]
    rolled = rollout_numbers(rollout, kl_coef, config)
    epochs = [epoch_numbers(rollout, outputs, config) for outputs in course.outputs]
    means = [batch_numbers(rollout, *each) for each in zip(course.outputs, epochs, strict=True)]
    settings = {name: getattr(config, name) for name in SETTINGS.split()}
    settings |= {"kl_coef": kl_coef, "learning_rate": learning_rate(config, number)}
    return told | {
        "update": number,
        "settings": settings,
        "scores": scores_of(course, config),
        "whitening": whitening_of(rollout, rolled["advantage"]) if config.whiten_advantages else None,
        "batch": {
            "n_rows": len(rollout.mask),
            "n_tokens": int(rollout.mask.sum()),
            "epochs": means,
            "raw": raw_rows(rollout),
        },
        "rows": [row_trace(course, tokenizer, row, rolled, epochs) for row in rows],
        "updates": course.updates,
        "equations": equations(),
    }


# --------------------------------------------------------------------------------------------------------------------
# The task
# --------------------------------------------------------------------------------------------------------------------


def asked_rows(config: Config) -> list[dict]:
    """The prompts that were given; none where they are the data's. Raises UsageError for what cannot be shown."""
    if config.output:
        check_new_file(Path(config.output))
        if Path(config.output).suffix not in KINDS:
            raise UsageError(f"--output {config.output}: expected a name that ends in {' or '.join(KINDS)}")
    rows = named_rows(config)
    check_is_text(rows)
    if config.update != NO_UPDATE:
        check_update(config)
        if rows:
            raise UsageError(
                f"--update {config.update} of a run has prompts of its own: leave --prompt and --prompts out"
            )
    n_rows = len(rows) or config.batch_size
    for row in config.row:
        if row >= n_rows:
            raise UsageError(f"--row {row} is beyond the batch, whose {n_rows} responses are counted from 0")
    return rows


def check_update(config: Config) -> None:
    """Raise UsageError for an update that the run has not logged."""
    n_done = len(whole_lines(Path(config.output_dir) / STATS))
    if config.update >= n_done:
        raise UsageError(
            f"--update {config.update} is beyond {config.output_dir}, whose {n_done} updates are counted from 0"
        )


def training_config(config: Config) -> Config:
    """The settings as those of `train`, which are refused where training would refuse them."""
    return replace(config, task="train")


def explain(config: Config, asked: list[dict], base_model: str, reward_model_path: str) -> str:
    """The `explain` task: what is to be printed of an update, or of the file that it was written to. `asked` are the
    rows of the prompts that were given.
    """
    scene = scene_of(config, asked, base_model, reward_model_path)
    rows = list(dict.fromkeys(config.row)) or list(range(len(asked) or 1))
    if config.dry_run:
        return f"dry run: {scene.title} would be shown, with row {', '.join(map(str, rows))} of its batch\n"
    course = played(scene)
    note = scene.note
    number = max(config.update, 0)
    planned = len(shuffled_steps(len(course.rollout.mask), scene.config, number))
    if course.n_steps < planned - course.updates[-1]["skipped_steps"]:
        note += f"\n--target_kl ended the update after {course.n_steps} of its {planned} optimizer steps."
    if config.update != NO_UPDATE:
        stats = log_row(number, course.rollout, course.updates[-1], scene.config)
        note += "\n" + compared_with_log(Path(config.output_dir), course.rollout, stats, rows)
    model = config.output_dir or config.base_model_name or "built-in"
    tokenizer = scene.fixed.tokenizer
    trace = trace_of(course, tokenizer, scene.config, number, rows, title=scene.title, model=model, note=note)
    if not config.output:
        return text_of(trace, is_coloured())
    write(trace, Path(config.output))
    return f"{scene.title}: {config.output}\n"


def write(trace: dict, path: Path) -> None:
    """The trace as a page, or as the numbers alone, by the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        return write_whole(path, json.dumps(known_to_json(trace), allow_nan=False, indent=1) + "\n")
    write_page(trace, path)


def played(scene: Scene) -> Course:
    """The update that is asked for, after those of the run that come before it, with a progress bar over all epochs:
    to look at it after each of its epochs, it is made again, with one epoch, with two, and so on.
    """
    config, state = scene.config, scene.state
    before = range(state.next_update, max(config.update, 0))
    plan = planned_updates(config) if before else {}
    n_epochs = config.ppo_epochs
    total = len(before) * n_epochs + n_epochs * (n_epochs + 1) // 2
    with progress(total, f"explain, an update of 1 to {n_epochs} epochs", "epoch") as advance:
        for number in before:
            then = replace(config, n_updates=plan.get(number, config.n_updates))
            next(train(state, scene.fixed, scene.prompts, then))
            advance({}, n_epochs)
        return course_of(state, scene.fixed, scene.prompts, config, advance)
