"""What a run is made of, as one frozen tree of validated settings: every default stands here, once. Torch-free.

The unit of a setting is in its description. A setting is checked as it is made; `rules.py` says what must agree.
"""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from qalora.adapter.allocation import Init, Share, parse_duration
from qalora.adapter.targets import check_expression
from qalora.base.families import BLOCK_MAPS
from qalora.errors import InputError
from qalora.memory import Checkpointing
from qalora.paths import expanded

ROUNDS_FROM = 1000  # steps of a run
Metric = Literal["loss", "exact_match", "accuracy", "rougeL"]
Duration = Annotated[int | float | str, AfterValidator(parse_duration)]
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial",
    "inverse_sqrt", "warmup_stable_decay", "constant", "constant_with_warmup", "reduce_lr_on_plateau", "greedy",
]  # fmt: skip
Tracker = Literal[
    "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow", "neptune",
    "swanlab", "tensorboard", "trackio", "wandb",
]  # fmt: skip
Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "adafactor",
    "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit",
]  # fmt: skip


def options(annotation: Any) -> tuple[Any, ...]:
    """The types that a setting may have."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", protected_namespaces=(), validate_default=True, allow_inf_nan=False, frozen=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _paths_are_texts(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [os.fspath(each) if isinstance(each, os.PathLike) else each for each in value]
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("*", mode="before")
    @classmethod
    def _truth_values_where_they_belong(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and bool not in options(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("a value is missing, or is a truth value for YAML: put it in quotes if it is a text")
        return value


class DataConfig(Section):
    """Where the rows are and how a row becomes a prompt and a completion."""

    train: str | list[str] = Field(
        "",
        description="file (json, jsonl, csv, tsv, parquet, arrow, txt; .gz, .zst, .zip …), pattern, folder, Hub id, "
        "qalora:quickstart, or a list of these",
    )
    validation: str | list[str] | None = Field(
        None, description="like train; null holds rows of train back (val_set_size)"
    )
    split: str = Field("train", description="of train, where it has splits; also a slice, as in train[:10%]")
    validation_split: str = Field("validation", description="of validation, likewise")
    name: str | None = Field(None, description="configuration of a Hub data set, such as gsm8k's main")
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt-completion", "text"] = "auto"
    columns: dict[str, str] = Field({}, description="column in the file → column that the format expects")
    prompt_template: str | None = Field(None, description="the prompt, with {column} fields")
    completion_template: str | None = Field(None, description="the completion, with {column} fields")
    labels: dict[str, str] = Field({}, description="completion in the file → text to train on, e.g. 0: negative")
    chat: bool | None = Field(
        None,
        description="wrap prompt and completion in the chat template; null: chat formats, and where the model was "
        "taught to chat",
    )
    chat_template: str | None = Field(
        None, description="Jinja file, or its text, in place of the tokenizer's own; it goes along with the tokenizer"
    )
    chat_template_kwargs: dict[str, bool | int | float | str | None] = Field(
        {}, description="switches of the chat template, e.g. enable_thinking: false, written into it as its defaults"
    )
    mask_history: bool = Field(False, description="of several answers in a row only the last is learned")
    max_seq_len: int = Field(2048, ge=8, description="tokens a row; longer rows are cut and counted")
    val_set_size: int | float = Field(0.05, ge=0, description="rows (integer) or share (below 1) of train held back")
    max_rows: int | None = Field(
        None, ge=1, description="rows of train read, those held back for validation included; null: all"
    )
    train_on_inputs: bool = Field(False, description="loss on the prompt too")
    packing: bool = Field(False, description="several rows in one sequence of max_seq_len tokens")

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _names_alone(cls, where: Any) -> Any:
        if any(isinstance(each, Mapping) for each in (where if isinstance(where, list) else [where])):
            raise ValueError(
                "name files, folders or Hub ids alone; what they hold is said by data.format, data.split and data.name"
            )
        return where

    @field_validator("train", "validation")
    @classmethod
    def _expanded(cls, where: Any) -> Any:
        return expanded(where)

    @field_validator("columns", "labels", mode="before")
    @classmethod
    def _texts(cls, pairs: Any) -> Any:
        if not isinstance(pairs, Mapping):
            return pairs
        if any(isinstance(text, bool) for text in pairs.values()):
            raise ValueError("yes, no, true and false are truth values for YAML; put the text in quotes")
        texts = {str(value): str(text) for value, text in pairs.items()}
        if len(texts) < len(pairs):
            names = [str(value) for value in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice} stands twice, as a text and as a number or a truth value; keep one")
        return texts

    def reading(self) -> dict[str, Any]:
        """How a row becomes tokens, as the keyword arguments of `load_dataset`."""
        names = (
            "name format columns prompt_template completion_template labels chat chat_template chat_template_kwargs "
            "mask_history max_seq_len train_on_inputs"
        )
        return {name: getattr(self, name) for name in names.split()}


class QuantizationConfig(Section):
    """The frozen base: bitsandbytes' 4-bit formats."""

    load_in_4bit: bool = True
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="also the dtype of an unquantized base; auto: by device, measured on a CPU"
    )

    def loading(self) -> dict[str, Any]:
        """The keyword arguments of `load_base`."""
        return {
            "load_in_4bit": self.load_in_4bit,
            "quant_type": self.bnb_4bit_quant_type,
            "double_quant": self.bnb_4bit_use_double_quant,
            "dtype": self.bnb_4bit_compute_dtype,
        }

    def given(self) -> list[str]:
        """Those of them that somebody set."""
        names = dict(zip(self.loading(), QuantizationConfig.model_fields, strict=True))
        return [argument for argument, setting in names.items() if setting in self.model_fields_set]


class LoraSettings(Section):
    """The adapter at birth: z = W x + alpha / r · B A x (arXiv 2403.16187, §3.2)."""

    r: int = Field(8, ge=1, description="ranks a module at the start; the budget is r times the modules")
    alpha: int = Field(16, ge=1, description="scaling = alpha / r; it never changes, whatever the ranks become")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    adapter: str | None = Field(
        None,
        description="folder of a plain PEFT LoRA, of any origin, that the run starts from; r, alpha and target_modules "
        "are its own, its ranks are the budget; null: a new adapter",
    )
    init: Literal["auto"] | Init = Field(
        "auto",
        description="where ranks point when they are born; kaiming: anywhere, as PEFT has it; gradient: along the "
        "leading directions of dL/dW on init_rows training rows, B being zero as ever; quantization: the first ranks "
        "of a map give back what 4 bits took from it on these rows, which needs the 16-bit weights; auto: quantization "
        "where it can be, else gradient, and kaiming with allocation.rounds=0",
    )
    init_rows: int = Field(
        16, ge=1, description="training rows that init=gradient reads, and of which init=quantization draws its tokens"
    )
    target_modules: str | list[str] = Field(
        "all-linear",
        description="the linear layers that get an adapter; all-linear: those of every block; a list: names or their "
        "ends, such as q_proj; another text: a regular expression that matches whole names, such as .*\\.(q|v)_proj",
    )
    layers_to_transform: list[int] | None = Field(
        None, description="blocks that get adapters, counted from 0; null: all"
    )
    compress: bool = Field(
        False,
        description="at the end the best weights are cut to the smallest size that costs nothing on validation rows; "
        "adapter/ holds the cut, the best checkpoint the whole",
    )

    @field_validator("adapter")
    @classmethod
    def _expanded(cls, where: str | None) -> str | None:
        return expanded(where)

    @field_validator("target_modules")
    @classmethod
    def _linear_layers_of_a_block(cls, targets: str | list[str]) -> str | list[str]:
        if isinstance(targets, str):
            return check_expression(targets)
        if not targets or "lm_head" in targets:
            known = [name.rpartition(".")[2] for name in BLOCK_MAPS]
            raise ValueError(
                f"{'lm_head' if targets else 'none'} is no linear layer of a block; name some of {', '.join(known)}, "
                "or all-linear"
            )
        return targets

    @field_validator("layers_to_transform", mode="before")
    @classmethod
    def _one_block_or_several(cls, layers: Any) -> Any:
        return [layers] if isinstance(layers, int) else layers

    @field_validator("layers_to_transform")
    @classmethod
    def _blocks_that_can_be(cls, layers: list[int] | None) -> list[int] | None:
        if layers is not None and (not layers or min(layers) < 0):
            raise ValueError("name blocks by their numbers, from 0 on; null takes all")
        return layers


class AllocationConfig(Section):
    """Algorithm 1 of ALoRA (arXiv 2403.16187). Warm-up, interval and eq. 6 are the paper's (§4.3, appendix E); start,
    number of rounds, budget and how scores are computed are ours, and preset=paper takes back all of these but
    `scoring`."""

    preset: Literal["paper"] | None = Field(
        None, description="paper: the paper's settings, for those that are not given beside it"
    )
    start: Share = Field(
        "even",
        description="ranks of a module before the first step; even: lora.r; scores: of twice as many, each a "
        "correction of lora.init=quantization, those that lower the loss most on its rows, which gave nothing on E2E "
        "(bench/results)",
    )
    rounds: int | None = Field(
        None,
        ge=0,
        description="N_A, rounds of pruning and growing at most; null: the paper's 8 in runs of 1,000 steps or more, "
        "and none in shorter ones, for in runs of 20 to 300 steps they gave nothing (bench/results); 0: ranks stay as "
        "they start",
    )
    prune_per_round: int | None = Field(
        None, ge=1, description="n_A, ranks; null: one per module, and at most half of all"
    )
    warmup: Duration = Field("1 epoch", description="K1, before the first round: steps, share of the run, or epochs")
    interval: Duration = Field("0.25 epochs", description="K2, between rounds: steps, share of the run, or epochs")
    val_batch_size: int = Field(32, ge=1, description="|B_val|, validation rows that score the ranks")
    scoring: Literal["auto", "certified", "first-order", "exact", "path"] = Field(
        "auto",
        description="first-order: two forward-backward passes for all ranks; exact: two forwards for each; certified: "
        "exact where first order leaves a doubt; auto: certified as far as 3 % of the training so far allow",
    )
    importance: Literal["sum", "drop", "alone", "path"] | None = Field(
        None,
        description="sum is eq. 6: drop + alone; path: integrated from base to adapter; null: path for scoring path, "
        "else sum",
    )
    min_rank: int = Field(0, ge=0, description="ranks that every module keeps")
    max_rank: int | None = Field(None, ge=1, description="ranks that no module exceeds; null: no limit")
    budget: Literal["ranks", "parameters"] = Field(
        "parameters",
        description="what never rises above the start: the number of ranks, or that and their parameters, for a rank "
        "of a wide map has more of them",
    )

    def rounds_in(self, total_steps: int) -> int:
        """N_A of a run of so many optimizer steps."""
        if self.rounds is not None:
            return self.rounds
        return 8 if total_steps >= ROUNDS_FROM else 0

    @property
    def kind(self) -> Literal["sum", "drop", "alone", "path"]:
        """The importance that decides."""
        return self.importance or ("path" if self.scoring == "path" else "sum")


class TrainingConfig(Section):
    micro_batch_size: int = Field(4, ge=1, description="rows (packed sequences with data.packing) a forward pass")
    gradient_accumulation_steps: int = Field(4, ge=1, description="micro-batches an optimizer step")
    num_epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(
        None, ge=1, description="optimizer steps; overrides num_epochs; null, or -1 as elsewhere: num_epochs decides"
    )
    learning_rate: float = Field(1e-4, gt=0)
    lr_scheduler_type: Schedule = Field(
        "linear",
        description="transformers' schedules; constant, reduce_lr_on_plateau and greedy have no warm-up, and the last "
        "two follow the validation loss",
    )
    lr_scheduler_kwargs: dict[str, Any] = Field(
        {}, description="what the schedule takes besides, e.g. min_lr_rate: 0.1 of cosine_with_min_lr"
    )
    warmup_ratio: float | None = Field(0.06, ge=0, lt=1, description="share of the run; null beside warmup_steps")
    warmup_steps: int | float | None = Field(
        None, ge=0, description="optimizer steps, or below 1 a share of the run, in the place of warmup_ratio"
    )
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(1.0, ge=0, description="gradients are scaled down to it; null or 0: never")
    label_smoothing_factor: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of every target that all tokens have alike; in training, never in validation",
    )
    neftune_noise_alpha: float | None = Field(
        None, ge=0, description="NEFTune: noise on the embeddings while training (arXiv 2310.05914); null or 0: none"
    )
    optim: Optimizer = "adamw_torch"
    gradient_checkpointing: Checkpointing | Literal["auto"] = Field(
        "auto",
        description="true: compute blocks again in the backward; selective: all but what their linear layers put out; "
        "offload: blocks, with their inputs in host memory; false: nothing; auto: the fastest of these that the plan "
        "has room for",
    )
    mlp_tile: int | None = Field(None, ge=1, description="tokens of a row that an MLP works on at a time; null: all")
    fit: Literal["auto"] | None = Field(
        None,
        description="auto: choose micro_batch_size, gradient_accumulation_steps, gradient_checkpointing and mlp_tile "
        "for the memory there is, with the same rows an optimizer step",
    )
    group_by_length: bool = Field(True, description="rows of like length share a batch, so that little is padded")
    eval_strategy: Literal["steps", "epoch", "no"] = Field(
        "steps", description="when the validation loss is taken; no: never, and the last weights are the result"
    )
    eval_steps: int | float = Field(
        200, gt=0, description="optimizer steps between validation losses; below 1: that share of the run"
    )
    save_strategy: Literal["steps", "epoch", "best", "no"] = Field(
        "steps",
        description="when a checkpoint is written, besides that of the best validation loss; no: never, and the last "
        "weights are the result",
    )
    save_steps: int | float = Field(
        200, gt=0, description="optimizer steps between checkpoints; below 1: that share of the run"
    )
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept; the best one is never removed")
    early_stopping_patience: int | None = Field(10, ge=1, description="validations without a better loss; null: never")
    seed: int = Field(42, ge=0, lt=2**32)
    report_to: list[Tracker] = Field(
        [], description="experiment trackers that transformers writes to; each needs its package"
    )

    @field_validator("max_steps", mode="before")
    @classmethod
    def _no_limit(cls, steps: Any) -> Any:
        return None if steps == -1 else steps

    @field_validator("eval_strategy", "save_strategy", mode="before")
    @classmethod
    def _no_is_a_word(cls, strategy: Any) -> Any:
        return "no" if strategy is False else strategy  # for YAML it is a truth value

    @field_validator("lr_scheduler_kwargs", mode="before")
    @classmethod
    def _numbers(cls, settings: Any) -> Any:
        settings = yaml.safe_load(settings) if isinstance(settings, str) else settings
        if settings is None:
            return {}
        return {k: _number(v) for k, v in settings.items()} if isinstance(settings, dict) else settings

    @field_validator("eval_steps", "save_steps", "warmup_steps")
    @classmethod
    def _whole_or_a_share(cls, steps: int | float | None) -> int | float | None:
        if steps is None or steps < 1:
            return steps
        if steps != int(steps):
            raise ValueError("a number of steps is whole, a share of the run is below 1")
        return int(steps)

    @model_validator(mode="before")
    @classmethod
    def _one_warmup(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("warmup_steps") is not None:
            return {"warmup_ratio": None, **given}
        return given


class EvaluationConfig(Section):
    """Taken before and after training on the same validation rows."""

    before: bool = True
    after: bool = True
    metrics: list[Metric] = ["loss"]
    rows: int | None = Field(None, ge=1, description="validation rows used; null: all")
    batch_size: int = Field(8, ge=1, description="rows a forward pass")
    max_new_tokens: int = Field(128, ge=1)
    choices: list[str] | None = Field(
        None, description="completions that accuracy chooses from; null: those of the data"
    )
    answer_pattern: str | None = Field(
        None, description="regular expression; its first group is what exact_match compares"
    )
    normalize: Literal["numbers"] | None = Field(
        None,
        description="numbers: exact_match sets commas, blanks, $ and a full stop at the end aside, as GSM8K is scored",
    )

    def asking(self) -> dict[str, Any]:
        """What is measured, as the keyword arguments of `metrics.check` and `metrics.evaluate`."""
        return {name: getattr(self, name) for name in ("metrics", "choices", "answer_pattern", "normalize")}


class LoggingConfig(Section):
    steps: int = Field(10, ge=1, description="optimizer steps between log lines")
    quiet: bool = False


class Recipe(Section):
    """All settings of a run (docs/settings.md); `load_recipe` makes one, and `to_yaml` writes it."""

    model: str = Field("", description="registry name, Hub id, folder or .gguf file")
    output_dir: str | None = Field(None, description="null: outputs/RECIPE-MODEL")
    merge: bool = Field(False, description="also write the merged 16-bit model to output_dir/merged")
    push_to_hub: bool | None = Field(
        None, description="push the adapter to the Hub at the end; null: where hub_model_id names a repository"
    )
    hub_model_id: str | None = Field(
        None,
        description="repository of the Hub, OWNER/NAME; null: the name of output_dir, in the namespace of the token",
    )
    hub_private_repo: bool = Field(False, description="a repository that the push makes is private")
    data: DataConfig = DataConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    lora: LoraSettings = LoraSettings()
    allocation: AllocationConfig = AllocationConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @field_validator("model", "output_dir")
    @classmethod
    def _expanded(cls, where: str | None) -> str | None:
        return expanded(where)

    def repository(self) -> str | None:
        """Where the adapter is pushed at the end; None: nowhere."""
        if self.push_to_hub is None:
            return self.hub_model_id
        return (self.hub_model_id or Path(self.output_dir or "").resolve().name) if self.push_to_hub else None

    def chosen_init(self, *, sixteen_bit: bool) -> Init:
        """lora.init, settled where it was left open.

        Args:
            sixteen_bit: the base's 16-bit weights are at hand; a base that is stored in 4 bits has none.
        """
        if self.lora.init != "auto":
            return self.lora.init
        if self.lora.adapter:
            return "kaiming"
        moving, chosen = self.allocation.rounds != 0, self.allocation.start == "scores"
        if chosen or (moving and self.quantization.load_in_4bit and sixteen_bit):
            return "quantization"
        return "gradient" if moving else "kaiming"

    def with_settings(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with settings that a run has decided: dotted name → value. `finetune` checks what a script sets.

        Raises:
            InputError: no such setting.
        """
        known = [name for name, _ in setting_types()]
        for name in settings:
            if name not in known:
                near = [each for each in known if each.rpartition(".")[2] == name.rpartition(".")[2]]
                raise InputError(f"{name}: no such setting{f', did you mean {near[0]}?' if near else '.'}")
        sections: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            section, _, setting = name.rpartition(".")
            sections.setdefault(section, {})[setting] = value
        own = sections.pop("", {})
        changed = {name: getattr(self, name).model_copy(update=update) for name, update in sections.items()}
        return self.model_copy(update={**own, **changed})

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _number(value: Any) -> Any:
    """A number that YAML takes for a text, such as 1e-6."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def setting_types(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every setting."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from setting_types(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", annotation
