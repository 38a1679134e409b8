"""Every setting of a run: one frozen dataclass, with its help and its range, and the presets."""

import dataclasses
import difflib
import json
import math
import os
import reprlib
import string
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from progress import visible


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why in a sentence."""

    exit_code = 2


class RunError(Exception):
    """Work that had begun cannot go on; the message says why in a sentence."""

    exit_code = 1


class BrokenPolicy(RunError):
    """The policy's probabilities are no numbers: what has been trained is worth nothing."""


class Stopped(RunError):
    """Work that was ended in good order, because a signal asked for it."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # as in a shell


VERSION = "0.1.0"
TASKS = ("train", "generate", "sft", "reward", "evaluate", "plot", "explain")
TRAINING = ("train", "sft", "reward")  # tasks that train a model
USES_A_RUN = ("generate", "evaluate", "plot", "explain")  # tasks that start from a run and its settings
NO_UPDATE = -1  # of a run's, which are counted from 0
MIN_TEMPERATURE = 1e-3  # below it, logits over it could leave float32
REWARD_WEIGHTS = (
    "terms and weights, of reward_model, reward_fn, repetition (below 0 to punish it) and length (above 0), as in "
    "reward_model=1.0,repetition=-0.5,length=0.1; none: reward_fn if it is given, else reward_model"
)
POLICIES = (
    "NAME=FOLDER_OR_ID of one to compare, the first being the reference; may be given several times; none: "
    "before=<the base model> and after=<the run>. For `--task plot`: NAME=FOLDER of a run to draw"
)
OUTPUT = (
    "a new file in place of printing: JSON Lines of prompt, response, reward, or for explain a page (.html) or its "
    "numbers (.json)"
)
MATMUL_PRECISION = "of float32 products, as torch names it; auto: the fastest here of those as exact as float32"
DTYPES = ("float32", "bfloat16", "float16")
TRACKERS = ("", "tensorboard", "wandb", "trackio", "swanlab")
LARGEST_FLOAT = 3.4028234663852886e38  # of float32, in which a setting meets the tensors
LONGEST_NAME = 255  # bytes of a file's or folder's name, on Linux as on macOS
PRESETS = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8"))

# settings that are, or begin with, a file or folder
PATHS = "output_dir final_dir base_model_name peft_model_path dataset_path reward_model_path reward_fn prompts output"


def option(group: str, default, text: str, allowed: str | tuple[str, ...] = ""):
    """A field with its help (units included), and the interval that its value must lie in, or the choices it has."""
    metadata = {"group": group, "help": text, "interval": "", "choices": ()}
    if isinstance(allowed, tuple):
        metadata["choices"] = allowed
    else:
        metadata["interval"] = allowed
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """A run's settings, checked when made: raises UsageError for a value outside its interval or choices."""

    task: str = option("task", "train", "what to do", TASKS)
    preset: str = option("task", "", "the system to start from", ("", *PRESETS))
    run_name: str = option("task", "", "folder under saved_models/ of a run's stages, {dataset} being the data's name")
    output_dir: str = option(
        "task", "", "folder to write, or for generate, evaluate, plot and explain to read: docs/usage.md"
    )
    final_dir: str = option("task", "", "where the newest trained policy is also put, in place of the one before it")
    seed: int = option("task", 0, "seed of weights, sampling and order", "[0, 4294967296)")
    device: str = option("task", "auto", "where to compute: auto takes CUDA if there is one, else the CPU")
    matmul_precision: str = option("task", "auto", MATMUL_PRECISION, ("auto", "highest", "high", "medium"))
    resume: bool = option("task", False, "go on with a run that was interrupted: the newest, or that of --output_dir")
    save_every: int = option("task", 0, "updates between checkpoints; 0: as often as costs 1 % of the time", "[0, inf)")
    keep_checkpoints: int = option("task", 2, "the newest so many are kept; 0: none is made, no resuming", "[0, inf)")
    log_with: str = option("task", "", "tracker that is told of the run as well: docs/usage.md", TRACKERS)
    push_to_hub: str = option(
        "task", "", "repository of the Hub, NAME or OWNER/NAME, that gets the result: docs/usage.md"
    )
    dry_run: bool = option("task", False, "check all that can be, show three samples, write nothing")

    base_model_name: str = option("model", "", "language model: Hub id or folder; none: trained here from scratch")
    dtype: str = option("model", "float32", "of the weights", DTYPES)
    mixed_precision: str = option("model", "no", "autocast forward passes to bfloat16", ("no", "bf16"))
    allow_pickle: bool = option("model", False, "read weights that are in a pickle (.bin) alone: its numbers, no code")
    peft_model_path: str = option("model", "", "LoRA adapter to go on training, on the base model: Hub id or folder")
    lora_r: int = option("model", 0, "rank of a new LoRA adapter; 0: none, all weights are trained", "[0, 10000]")
    lora_alpha: float = option("model", 16.0, "the adapter's output is scaled by this over its rank", "(0, inf)")
    merge: bool = option("model", False, "save the whole model with the adapter folded in, not the adapter alone")
    load_in_8bit: bool = option("model", False, "base weights under LoRA in 8 bits, by bitsandbytes")
    load_in_4bit: bool = option("model", False, "base weights under LoRA in 4 bits, by bitsandbytes")
    reference_in_8bit: bool = option("model", False, "the frozen reference in 8 bits, apart from the policy's weights")
    critic: str = option("model", "shared", "what the value head reads (model.py)", ("shared", "separate", "encoder"))
    gradient_checkpointing: bool = option("model", False, "recompute activations in the update, to save memory")

    dataset_path: str = option("data", "", "Hub id, folder or file; none: the built-in generated movie reviews")
    dataset_config: str = option("data", "", "the dataset's configuration, where it has several")
    dataset_split: str = option("data", "train", "split that prompts and training text are taken from")
    prompt_column: str = option("data", "text", "column of the prompt, text or messages; where there is no text, query")
    prompt_template: str = option("data", "", "the prompt, with column names in braces: 'Summarize: {dialogue}'")
    chat: bool = option("data", False, "texts are a user's turn in the model's chat template, as messages always are")
    system: str = option("data", "", "text of a system's turn, put before conversations that have none of their own")
    min_prompt_chars: int = option("data", 0, "shorter texts in the prompt column are left out", "[0, inf)")
    max_prompt_chars: int = option("data", 0, "longer ones are left out; 0: none", "[0, inf)")
    completion_column: str = option("data", "", "column that `--task sft` learns to write behind the prompt")
    reference_column: str = option("data", "", "column of texts to compare responses with by ROUGE; none: no ROUGE")
    label_column: str = option("data", "label", "column that holds a text's class, for `--task reward`")
    prompt_tokens: int = option("data", 0, "the prompt is so many first tokens, in whole words; 0: all", "[0, inf)")
    max_prompt_length: int = option("data", 512, "longest prompt in tokens", "[1, 1000000]")
    long_prompts: str = option("data", "truncate", "longer ones: cut on the left?", ("truncate", "refuse"))

    reward_model_path: str = option("reward", "", "sequence classifier: Hub id or folder; none: the one trained here")
    reward_label: str = option("reward", "", "the label that is rewarded, by name or index; none: the last of two")
    reward_in_8bit: bool = option("reward", False, "the classifier's weights in 8 bits, by bitsandbytes")
    reward_output: str = option("reward", "logit", "of the label", ("logit", "logprob", "probability", "margin"))
    reward_input: str = option("reward", "prompt_response", "text scored", ("prompt_response", "response"))
    reward_fn: str = option("reward", "", "FILE.py:NAME of a function (prompts, responses, rows) -> scores")
    reward_weights: str = option("reward", "", REWARD_WEIGHTS)
    length_range: str = option("reward", "", "LOW,HIGH in words: the term length is 0 from LOW to HIGH, -1 outside")
    missing_eos_penalty: float = option("reward", 0.0, "subtracted from a score without EOS", "[0, inf)")
    whiten_scores: bool = option("reward", False, "scores to mean 0, variance 1 in each rollout: a rise is lost")
    normalize_scores: bool = option("reward", False, "the same by all scores of the run so far: a rise is kept")
    score_clip: float = option("reward", 0.0, "clip scores to plus or minus this; 0: off", "[0, inf)")

    max_new_tokens: int = option("sampling", 48, "longest response in tokens", "[1, 1000000]")
    temperature: float = option("sampling", 1.0, "divides the logits; 0 is greedy, for generate only", "[0, inf)")
    static_cache: bool = option(
        "sampling", False, "sampling's steps all of one shape, for a GPU to replay: docs/costs.md"
    )
    top_k: int = option("sampling", 0, "draw among the k likeliest tokens, for generate only; 0: all", "[0, inf)")
    top_p: float = option("sampling", 1.0, "draw among the likeliest tokens of this mass, for generate only", "(0, 1]")
    min_new_tokens: int = option("sampling", 0, "no EOS before this many tokens, for generate only", "[0, inf)")

    n_updates: int = option("ppo", 100, "rollouts, each followed by an update", "[1, inf)")
    epochs: float = option("ppo", 0.0, "passes over the prompts, in place of n_updates; 0: as it says", "[0, 1e6]")
    batch_size: int = option("ppo", 64, "prompts in a rollout", "[1, 1000000]")
    mini_batch_size: int = option("ppo", 16, "most rows in a forward pass, of every training", "[1, inf)")
    gradient_accumulation_steps: int = option("ppo", 1, "minibatches in an optimizer step", "[1, inf)")
    ppo_epochs: int = option("ppo", 4, "passes over a rollout", "[1, 1000]")
    learning_rate: float = option("ppo", 1e-5, "Adam's, at the start; falls linearly to 0", "(0, inf)")
    max_grad_norm: float = option("ppo", 1.0, "gradients are scaled down to this norm", "(0, inf)")
    clip_range: float = option("ppo", 0.2, "the ratio is clipped to 1 plus or minus this", "(0, 1)")
    clip_range_value: float = option("ppo", 0.2, "a value may move this far in reward units", "(0, inf)")
    value_coef: float = option("ppo", 0.1, "weight of the value loss", "[0, inf)")
    entropy_coef: float = option("ppo", 0.0, "weight of the entropy bonus", "[0, inf)")
    gamma: float = option("ppo", 1.0, "discount per token", "[0, 1]")
    lam: float = option("ppo", 0.95, "lambda of GAE: 1 trusts returns, 0 trusts values", "[0, 1]")
    whiten_advantages: bool = option("ppo", True, "shift and scale advantages to mean 0, variance 1 over the rollout")
    kl_coef: float = option("ppo", 0.05, "price of one nat of KL to the reference, in reward units", "[0, inf)")
    kl_estimator: str = option("ppo", "k1", "in the reward: only k1 has the right optimum", ("k1", "k2", "k3", "abs"))
    kl_target: float = option("ppo", 0.0, "adapt kl_coef to this KL, in nats a response; 0: fixed", "[0, inf)")
    kl_horizon: float = option("ppo", 10000.0, "responses over which kl_coef adapts, above batch_size / 5", "(0, inf)")
    target_kl: float = option("ppo", 0.0, "end an update at 1.5 x this k3 to the old policy, nats; 0: off", "[0, inf)")
    eval_every: int = option("ppo", 0, "updates between looks at held-out prompts to keep the best; 0: off", "[0, inf)")

    vocab_size: int = option("stages", 1600, "of the tokenizer trained here", "[300, 1000000]")
    context_length: int = option("stages", 96, "longest text that sft or reward learns from, in tokens", "[8, 1000000]")
    n_layer: int = option("stages", 2, "layers of the model trained here", "[1, 1000]")
    n_embd: int = option("stages", 128, "width of the model trained here", "[1, 100000]")
    n_head: int = option("stages", 4, "attention heads of the model trained here", "[1, inf)")
    n_reviews: int = option("stages", 16000, "size of the built-in corpus", "[100, 1000000]")
    sft_first: bool = option("stages", False, "`--task train` runs `--task sft` first where its folder is not there")
    sft_epochs: float = option("stages", 0.0, "passes over the texts, in place of sft_steps; 0: as it says", "[0, 1e6]")
    sft_steps: int = option("stages", 1700, "optimizer steps of the language model's training", "[1, inf)")
    sft_batch_size: int = option("stages", 12, "texts an optimizer step", "[1, 1000000]")
    sft_learning_rate: float = option("stages", 2e-5, "AdamW's peak", "(0, inf)")
    chosen_column: str = option("stages", "", "column of the better answers: a reward model is trained on pairs")
    rejected_column: str = option("stages", "rejected", "column of the worse ones")
    reward_steps: int = option("stages", 300, "optimizer steps of the classifier's training", "[1, inf)")
    reward_batch_size: int = option("stages", 32, "texts or pairs an optimizer step", "[1, 1000000]")
    reward_learning_rate: float = option("stages", 1e-5, "AdamW's peak", "(0, inf)")

    eval_samples: int = option("evaluation", 256, "held-out prompts", "[2, 1000000]")
    eval_split: str = option("evaluation", "test", "to report on, or to choose by", ("test", "validation", "both"))
    policies: tuple[str, ...] = option("evaluation", (), POLICIES)

    update: int = option(
        "explain", NO_UPDATE, "look at this update of a run, the first being 0; -1: a new one", "[-1, inf)"
    )
    row: tuple[int, ...] = option(
        "explain", (), "show this response, 0 being the first; may be given several times", "[0, inf)"
    )

    prompt: tuple[str, ...] = option("generate", (), "a prompt; may be given several times")
    prompts: str = option("generate", "", "a file of prompts: .txt (one a line), .jsonl or .json")
    num_samples: int = option("generate", 1, "responses a prompt", "[1, 1000000]")
    stop: tuple[str, ...] = option("generate", (), "text that ends a response, as $'\\n'; may be given several times")
    output: str = option("generate", "", OUTPUT)
    without_reward: bool = option("generate", False, "the responses in --output alone, whose reward is not asked")

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            check_value(spec, getattr(self, spec.name))
        if self.task == "train":
            self.check_batches()
            self.check_horizon()
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise UsageError(
                f"--temperature is {self.temperature}, expected {MIN_TEMPERATURE} or more, or 0 for greedy choice"
            )
        if self.chosen_column and self.chosen_column == self.rejected_column:
            raise UsageError(
                f"--chosen_column and --rejected_column are both {self.chosen_column}: expected two columns"
            )
        self.check_weights_dtype()
        if self.critic == "encoder" and self.lam != 1:
            raise UsageError(f"--critic encoder values the prompt alone, unbiased for --lam 1 only, not {self.lam}")
        if "" in self.stop:
            raise UsageError("--stop is empty, expected the text before which a response is to end")
        if self.whiten_scores and self.normalize_scores:
            raise UsageError("--whiten_scores undoes --normalize_scores: choose one of them")
        if self.prompt_template:
            template_fields(self.prompt_template)
            if self.chat:
                raise UsageError("--chat puts a text into the model's own template: leave --prompt_template out")
        check_place("run_name", str(self.run_folder))
        if ".." in self.run_folder.parts or self.run_folder.is_absolute():
            raise UsageError(f"--run_name {str(self.run_folder)!r} is not under saved_models/: expected no / before it")
        if self.n_embd % self.n_head:
            raise UsageError(f"--n_head {self.n_head} does not divide --n_embd {self.n_embd}")
        truncates = self.temperature == 0 or self.top_k or self.top_p < 1 or self.min_new_tokens or self.stop
        if self.task in ("train", "evaluate", "explain") and truncates:
            raise UsageError(
                "--temperature 0, --top_k, --top_p, --min_new_tokens and --stop are for --task generate: training and "
                "its evaluation must score the very distribution they sample from; use --temperature alone"
            )

    def check_batches(self) -> None:
        """Raise UsageError unless a rollout is so many whole optimizer steps; a small one, not accumulated, is one."""
        if self.gradient_accumulation_steps == 1 and self.batch_size <= self.mini_batch_size:
            return
        step_rows = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % step_rows:
            closest = min(divisors(self.batch_size), key=lambda d: abs(d - step_rows))
            rows = self.mini_batch_size if closest % self.mini_batch_size == 0 else closest
            raise UsageError(
                f"--mini_batch_size {self.mini_batch_size} x --gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps} does not divide --batch_size {self.batch_size}; "
                f"the nearest that does is {closest} rows in all, as by --mini_batch_size {rows} "
                f"--gradient_accumulation_steps {closest // rows}"
            )

    def check_horizon(self) -> None:
        """Raise UsageError for a horizon so short that kl_coef could fall below 0, and KL be rewarded: an update takes
        0.2 batch_size / kl_horizon of it at most.
        """
        shortest = 0.2 * self.batch_size
        if self.kl_target and self.kl_horizon <= shortest:
            raise UsageError(
                f"--kl_horizon {self.kl_horizon} would let one update of --batch_size {self.batch_size} take all of "
                f"kl_coef away; expected more than {shortest:g} responses"
            )

    def check_weights_dtype(self) -> None:
        """Raise UsageError if weights would be trained that cannot be, or would lose what was learned."""
        training = self.task in TRAINING
        in_few_bits = self.load_in_8bit or self.load_in_4bit
        has_adapter = self.has_adapter or self.starts_from_adapter
        if self.load_in_8bit and self.load_in_4bit:
            raise UsageError("--load_in_8bit and --load_in_4bit were both given: choose one of them")
        if training and self.task != "reward" and in_few_bits and self.merge:
            raise UsageError("--merge would round the adapter away in weights of 8 or 4 bits: save the adapter alone")
        if in_few_bits and not has_adapter:
            raise UsageError("--load_in_8bit and --load_in_4bit freeze the weights: add --lora_r or --peft_model_path")
        if training and self.dtype != "float32" and not has_adapter:
            raise UsageError(
                f"--dtype {self.dtype} would round most of Adam's small steps away; train in float32 (fast with "
                "--mixed_precision bf16), or an adapter on such weights (--lora_r)"
            )

    @property
    def run_folder(self) -> Path:
        """Where a run's stages are: --run_name, else the preset or model, and the data where it is not the preset's."""
        name = self.run_name
        if not name:
            name = self.preset or Path(self.base_model_name).name
            own_data = PRESETS.get(self.preset, {}).get("dataset_path", "")
            if self.dataset_path != own_data:
                name += "-{dataset}"
        dataset = Path(self.dataset_path).stem or "reviews"
        return Path("saved_models") / name.replace("{dataset}", dataset)

    @property
    def has_adapter(self) -> bool:
        return bool(self.lora_r or self.peft_model_path)

    @property
    def starts_from_adapter(self) -> bool:
        """Whether the model to be trained is an adapter: that of the sft stage, where there is one, or that named; or
        the policy of the run that a task uses, wherever that started from.
        """
        stage = self.run_folder / "sft"
        start = str(stage) if self.task != "sft" and stage.exists() else self.base_model_name
        used = self.output_dir if self.task in USES_A_RUN else ""
        return any((Path(path) / "adapter_config.json").exists() for path in (start, used) if path)

    @property
    def trains_from_scratch(self) -> bool:
        return not self.base_model_name


def divisors(n: int) -> list[int]:
    """All of them, in order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    large = [n // d for d in reversed(small) if d * d != n]
    return small + large


def template_fields(template: str) -> list[str]:
    """The columns that --prompt_template names. Raises UsageError for anything but names in braces."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageError(f"--prompt_template {template!r}: {error}; a brace itself is written twice") from None
    fields = []
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not name or form or conversion or set(name) & set(".[]"):
            raise UsageError(
                f"--prompt_template {template!r}: expected columns' names in braces, and nothing else there"
            )
        fields.append(name)
    if not fields:
        raise UsageError(f"--prompt_template {template!r} names no column in braces: every prompt would be the same")
    return list(dict.fromkeys(fields))


def is_within(value: float, interval: str) -> bool:
    """Whether a number lies in an interval as `(0, 1]`: without 0, with 1. NaN lies in none."""
    low, high = interval[1:-1].split(",")
    above = value > float(low) if interval[0] == "(" else value >= float(low)
    below = value < float(high) if interval[-1] == ")" else value <= float(high)
    return above and below


def check_place(name: str, value: str) -> None:
    """Raise UsageError if nothing on a disk can be called so."""
    try:
        longest = max(len(os.fsencode(part)) for part in value.split("/"))
    except UnicodeEncodeError:
        raise UsageError(f"--{name} {reprlib.repr(value)} holds half a character, and can name no file") from None
    if "\0" in value or longest > LONGEST_NAME:
        raise UsageError(
            f"--{name} {reprlib.repr(value)} can name no file: expected {LONGEST_NAME} bytes at most between slashes, "
            f"of which none is NUL, found {longest}"
        )


def check_value(spec: dataclasses.Field, value) -> None:
    """Raise UsageError if a field's value is not among its choices or not in its interval, or can name no file."""
    if spec.name in (*PATHS.split(), "run_name", "policies"):
        for place in (value,) if isinstance(value, str) else value:
            check_place(spec.name, place)
    choices = spec.metadata["choices"]
    if choices and value not in choices:
        known = ", ".join(choice for choice in choices if choice)
        raise UsageError(f"--{spec.name} {value!r} is not one of {known}{nearest(str(value), choices)}")
    interval = spec.metadata["interval"]
    for number in value if isinstance(value, tuple | list) else (value,):
        if interval and not is_within(number, interval):
            raise UsageError(f"--{spec.name} is {number}, expected a value in {interval}")
    if isinstance(value, float) and abs(value) > LARGEST_FLOAT:
        raise UsageError(f"--{spec.name} is {value}, expected {LARGEST_FLOAT:.2g} at most, as float32 holds it")


def first_line(error: BaseException) -> str:
    """What a library said went wrong, short enough for a sentence of ours."""
    text = str(error).strip() or type(error).__name__
    return visible(text.splitlines()[0][:200])


def nearest(word: str, choices) -> str:
    """A clause that proposes the choice most like the word, or nothing."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def describe(config: Config) -> str:
    """The resolved settings that are not the defaults, in a line; all of them are in a run's run_config.json."""
    changed = []
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if value != spec.default:
            changed.append(f"{spec.name} {value}")
    return "settings: " + ", ".join(changed)


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)
