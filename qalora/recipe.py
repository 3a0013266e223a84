"""Recipes: what a run is made of, as one tree of validated settings. Torch-free.

A recipe is a YAML file (shipped by name, or any path) plus overrides from the command line. Every default of a
run stands here, once; the unit of a setting is in its description.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from qalora.adapter.allocation import Init, Share, parse_duration
from qalora.adapter.targets import EVERY, check_expression
from qalora.base.families import BLOCK_MAPS
from qalora.errors import InputError
from qalora.memory import Checkpointing
from qalora.paths import expanded
from qalora.spellings import advice
from qalora.yaml_file import TwiceError, read_yaml

ROUNDS_FROM = 1000  # steps of a run
Metric = Literal["loss", "exact_match", "accuracy", "rougeL"]
Duration = Annotated[int | float | str, AfterValidator(parse_duration)]
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial", "inverse_sqrt",
    "warmup_stable_decay", "constant", "constant_with_warmup", "reduce_lr_on_plateau", "greedy",
]  # fmt: skip
Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "adafactor",
    "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit",
]  # fmt: skip
FOLLOWERS = ("reduce_lr_on_plateau", "greedy")  # schedules that follow the validation loss
# Two names of one thing: what is set later takes the place of the other.
ONE_OF = (("training.warmup_steps", "training.warmup_ratio"),)


def _options(annotation: Any) -> tuple[Any, ...]:
    """The types that a setting may have."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_values_where_they_belong(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and bool not in _options(cls.model_fields[str(info.field_name)].annotation):
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
        description="wrap prompt and completion in the chat template; null: chat formats, and where the model was taught to chat",
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
            "name format columns prompt_template completion_template labels chat chat_template chat_template_kwargs mask_history "
            "max_seq_len train_on_inputs"
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
        description="folder of a plain PEFT LoRA, of any origin, that the run starts from; r, alpha and target_modules are its own, its "
        "ranks are the budget; null: a new adapter",
    )
    init: Literal["auto"] | Init = Field(
        "auto",
        description="where ranks point when they are born; kaiming: anywhere, as PEFT has it; gradient: along the leading directions of "
        "dL/dW on init_rows training rows, B being zero as ever; quantization: the first ranks of a map give back what 4 bits took "
        "from it on these rows, which needs the 16-bit weights; auto: quantization where it can be, else gradient, and kaiming "
        "with allocation.rounds=0",
    )
    init_rows: int = Field(
        16, ge=1, description="training rows that init=gradient reads, and of which init=quantization draws its tokens"
    )
    target_modules: str | list[str] = Field(
        "all-linear",
        description="the linear layers that get an adapter; all-linear: those of every block; a list: names or their ends, "
        "such as q_proj; another text: a regular expression that matches whole names, such as .*\\.(q|v)_proj",
    )
    layers_to_transform: list[int] | None = Field(
        None, description="blocks that get adapters, counted from 0; null: all"
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
        known = [name.rpartition(".")[2] for name in BLOCK_MAPS]
        unknown = [name for name in targets if name.rpartition(".")[2] not in known]
        if unknown or not targets:
            raise ValueError(
                f"{', '.join(unknown) or 'none'} is no linear map of a block; name some of {', '.join(known)}, or all-linear"
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
    """Algorithm 1 of ALoRA (arXiv 2403.16187). Warm-up, interval and eq. 6 are the paper's (§4.3, appendix E); start, number of
    rounds, budget and how scores are computed are ours, and preset=paper takes back all of these but `scoring`."""

    preset: Literal["paper"] | None = Field(
        None, description="paper: the paper's settings, for those that are not given beside it"
    )
    start: Share = Field(
        "even",
        description="ranks of a module before the first step; even: lora.r; scores: of twice as many, each a correction of "
        "lora.init=quantization, those that lower the loss most on its rows, which gave nothing on E2E (bench/results)",
    )
    rounds: int | None = Field(
        None,
        ge=0,
        description="N_A, rounds of pruning and growing at most; null: the paper's 8 in runs of 1,000 steps or more, and none in shorter "
        "ones, for in runs of 20 to 300 steps they gave nothing (bench/results); 0: ranks stay as they start",
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
        description="sum is eq. 6: drop + alone; path: integrated from base to adapter; null: path for scoring path, else sum",
    )
    min_rank: int = Field(0, ge=0, description="ranks that every module keeps")
    max_rank: int | None = Field(None, ge=1, description="ranks that no module exceeds; null: no limit")
    budget: Literal["ranks", "parameters"] = Field(
        "parameters",
        description="what never rises above the start: the number of ranks, or that and their parameters, for a rank of a wide "
        "map has more of them",
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
        description="transformers' schedules; constant, reduce_lr_on_plateau and greedy have no warm-up, and the last two follow the "
        "validation loss",
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
    gradient_checkpointing: Checkpointing = Field(
        True,
        description="compute blocks again in the backward; selective: all but what their maps put out; offload: blocks, with "
        "their inputs in host memory",
    )
    mlp_tile: int | None = Field(None, ge=1, description="tokens of a row that an MLP works on at a time; null: all")
    fit: Literal["auto"] | None = Field(
        None,
        description="auto: choose micro_batch_size, gradient_accumulation_steps, gradient_checkpointing and mlp_tile for the "
        "memory there is, with the same rows an optimizer step",
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
        description="when a checkpoint is written, besides that of the best validation loss; no: never, and the last weights are the result",
    )
    save_steps: int | float = Field(
        200, gt=0, description="optimizer steps between checkpoints; below 1: that share of the run"
    )
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept; the best one is never removed")
    early_stopping_patience: int | None = Field(10, ge=1, description="validations without a better loss; null: never")
    seed: int = Field(42, ge=0, lt=2**32)
    report_to: list[Literal["tensorboard", "wandb"]] = []

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

    @model_validator(mode="after")
    def _one_warmup(self) -> TrainingConfig:
        if self.warmup_steps is not None and "warmup_ratio" not in self.model_fields_set:
            self.warmup_ratio = None
        return self


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

    @model_validator(mode="after")
    def _settings_agree(self) -> Recipe:
        problems = list(self._disagreements())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _disagreements(self) -> Iterator[str]:
        if not self.model:
            yield "model is missing: pass --model NAME, FOLDER or FILE.gguf"
        if not self.data.train:
            yield "data.train is missing: pass data.train=FILE or a Hub id"
        if self.data.validation is None and not self.data.val_set_size:
            yield "no validation rows: set data.validation, or data.val_set_size above 0"
        if self.data.val_set_size >= 1 and self.data.val_set_size != int(self.data.val_set_size):
            yield f"data.val_set_size={self.data.val_set_size}: a number of rows is whole, a share is below 1"
        training = self.training
        if training.warmup_steps is not None and training.warmup_ratio is not None:
            yield (
                f"training.warmup_steps={training.warmup_steps} and training.warmup_ratio={training.warmup_ratio} say the same "
                "thing twice: leave one out"
            )
        if training.lr_scheduler_type in FOLLOWERS and training.eval_strategy == "no":
            yield (
                f"training.lr_scheduler_type={training.lr_scheduler_type} follows the validation loss, and "
                "training.eval_strategy=no takes none: set it to steps or epoch"
            )
        init, start = self.lora.init, self.allocation.start
        if self.lora.adapter and (init not in ("auto", "kaiming") or start == "scores"):
            asked = "allocation.start=scores" if start == "scores" else f"lora.init={init}"
            yield f"{asked} places new ranks, and lora.adapter={self.lora.adapter} brings trained ones: leave one of them out"
        if self.lora.adapter and self.lora.layers_to_transform is not None:
            yield (
                f"lora.layers_to_transform={','.join(map(str, self.lora.layers_to_transform))} chooses blocks for new ranks, and "
                f"lora.adapter={self.lora.adapter} brings its own: leave one of them out"
            )
        if start == "scores" and init not in ("auto", "quantization"):
            yield (
                f"allocation.start=scores chooses among the ranks of lora.init=quantization, and lora.init is {init}: set "
                "lora.init=quantization too"
            )
        elif (start == "scores" or init == "quantization") and not self.quantization.load_in_4bit:
            asked = "lora.init=quantization" if init == "quantization" else "allocation.start=scores"
            yield (
                f"{asked} gives back what 4 bits took, and quantization.load_in_4bit is false: nothing was taken; leave it out, or "
                "set lora.init=gradient"
            )
        scoring, kind = self.allocation.scoring, self.allocation.kind
        if (scoring == "path") != (kind == "path") and scoring != "auto":
            yield (
                f"allocation.importance={kind} is not what allocation.scoring={scoring} measures: path goes with "
                "scoring path or auto, the others with any but path"
            )
        low, high = self.allocation.min_rank, self.allocation.max_rank
        if self.lora.adapter:
            return  # r and alpha are the adapter's
        if high is not None and not low <= self.lora.r <= high:
            yield f"lora.r={self.lora.r} must lie between allocation.min_rank={low} and max_rank={high}"
        elif low > self.lora.r:
            yield f"allocation.min_rank={low} is above lora.r={self.lora.r}: lower it, or raise lora.r"
        scaling = self.lora.alpha / self.lora.r
        moving = self.allocation.rounds != 0 or start == "scores"
        if moving and any((scaling * r) / r != scaling for r in range(1, 1025)):
            yield (
                f"lora.alpha={self.lora.alpha} over lora.r={self.lora.r} is a scaling that PEFT cannot keep when ranks "
                f"change: make alpha a multiple of r, e.g. lora.alpha={2 * self.lora.r}"
            )

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

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _number(value: Any) -> Any:
    """A number that YAML takes for a text, such as 1e-6."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


# Other tools' spellings (docs of axolotl, LLaMA-Factory, litgpt, torchtune, qlora.py) → ours.
ALIASES = {
    "push_to_hub_model_id": "hub_model_id",
    "hub_repo_id": "hub_model_id",
    "base_model": "model",
    "model_name_or_path": "model",
    "dataset": "data.train",
    "data_path": "data.train",
    "datasets": "data.train",
    "train_file": "data.train",
    "validation_file": "data.validation",
    "dataset_train_split": "data.split",
    "dataset_test_split": "data.validation_split",
    "dataset_config_name": "data.name",
    "dataset_config": "data.name",
    "subset": "data.name",
    "dataset_format": "data.format",
    "type": "data.format",
    "formatting": "data.format",
    "cutoff_len": "data.max_seq_len",
    "sequence_len": "data.max_seq_len",
    "max_seq_length": "data.max_seq_len",
    "val_size": "data.val_set_size",
    "eval_dataset_size": "data.val_set_size",
    "val_split_fraction": "data.val_set_size",
    "train_on_source": "data.train_on_inputs",
    "train_on_prompt": "data.train_on_inputs",
    "mask_prompt": "data.train_on_inputs",
    "chat_template_jinja": "data.chat_template",
    "chat_template_path": "data.chat_template",
    "sample_packing": "data.packing",
    "neat_packing": "data.packing",
    "per_device_train_batch_size": "training.micro_batch_size",
    "num_train_epochs": "training.num_epochs",
    "epochs": "training.num_epochs",
    "lr": "training.learning_rate",
    "optimizer": "training.optim",
    "quant_type": "quantization.bnb_4bit_quant_type",
    "double_quant": "quantization.bnb_4bit_use_double_quant",
    "bits": "quantization.load_in_4bit",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_target": "lora.target_modules",
    "adapter_name_or_path": "lora.adapter",
    "lora_model_dir": "lora.adapter",
    "lora_target_modules": "lora.target_modules",
    "lora_dropout": "lora.dropout",
    "lora_layers_to_transform": "lora.layers_to_transform",
    "peft_layers_to_transform": "lora.layers_to_transform",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "eval_batch_size": "evaluation.batch_size",
    "eval_max_new_tokens": "evaluation.max_new_tokens",
    "max_train_steps": "training.max_steps",
    "num_warmup_steps": "training.warmup_steps",
    "lr_warmup_steps": "training.warmup_steps",
    "lr_scheduler": "training.lr_scheduler_type",
    "evaluation_strategy": "training.eval_strategy",
    "gradient_clipping": "training.max_grad_norm",
    "clip_grad_norm": "training.max_grad_norm",
    "label_smoothing": "training.label_smoothing_factor",
    "noisy_embedding_alpha": "training.neftune_noise_alpha",
    "use_gradient_checkpointing": "training.gradient_checkpointing",
    "logging_steps": "logging.steps",
    "max_samples": "data.max_rows",
    "dataset_name": "data.train",
    "quantization_bit": "quantization.load_in_4bit",
    "quantization_type": "quantization.bnb_4bit_quant_type",
    "double_quantization": "quantization.bnb_4bit_use_double_quant",
}
# allocation.preset → what it stands for.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "lora.init": "kaiming",
        "allocation.start": "even",
        "allocation.rounds": 8,
        "allocation.prune_per_round": None,
        "allocation.warmup": "1 epoch",
        "allocation.interval": "0.25 epochs",
        "allocation.val_batch_size": 32,
        "allocation.importance": None,
        "allocation.budget": "ranks",
    }
}
SOURCES = ("data.train", "data.validation")  # a comma may be part of a file's name
# Other tools' values → ours.
VALUE_ALIASES: dict[str, dict[Any, Any]] = {
    "data.format": {"input-output": "prompt-completion", "completion": "text"},
    "lora.target_modules": {"all": EVERY},
    "training.gradient_checkpointing": {"unsloth": "offload"},
    "training.optim": {
        "adamw": "adamw_torch",
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw": "paged_adamw_32bit",
        "lion": "lion_32bit",
        "paged_lion": "paged_lion_32bit",
    },
}


def recipes_dir() -> Path:
    """The folder of shipped recipes: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    return next(p for p in (package / "recipes", package.parent / "recipes") if p.is_dir())


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def profile_names() -> list[str]:
    """The shipped profiles: settings for a kind of machine, on top of any recipe."""
    return sorted(path.stem for path in (recipes_dir() / "profiles").glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe given by name or by path.

    Raises:
        InputError: neither a shipped recipe nor a file.
    """
    if name in recipe_names():
        return recipes_dir() / f"{name}.yaml"
    path = Path(name).expanduser()
    if path.is_file():
        return path
    raise InputError(
        f"--recipe {name}: no such recipe and no such file{_nearest(name, recipe_names())}; "
        f"`qalora recipes` lists them: {', '.join(recipe_names())}."
    )


def load_recipe(
    name: str | Path, overrides: Sequence[tuple[str, Any]] | Mapping[str, Any] = (), profile: str | None = None
) -> Recipe:
    """Reads a recipe, lays a profile over it, and then settings.

    Args:
        name: of a shipped recipe (alpaca, gsm8k …), or the path of a YAML file.
        overrides: dotted name of a setting → value (`{"training.max_steps": 200}`), or pairs of them.
        profile: settings for a kind of machine: 24gb, t4, cpu.

    Raises:
        InputError: every problem of the file and of the overrides, in one message.
    """
    path = recipe_path(str(name))
    overrides = list(overrides.items()) if isinstance(overrides, Mapping) else overrides
    check_once(overrides)
    settings = with_preset(read_settings(path))
    if profile is not None:
        if profile not in profile_names():
            raise InputError(f"--profile {profile}: no such profile; there are {', '.join(profile_names())}.")
        settings = _laid_over(settings, read_settings(recipes_dir() / "profiles" / f"{profile}.yaml"))
    origin = f"{path} and the command line" if overrides else str(path)
    return resolve(_laid_over(settings, with_preset(overrides)), origin=origin)


def _laid_over(below: Sequence[tuple[str, Any]], above: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Both, without what a setting above says by another name below."""
    known = dict(setting_types())

    def name(key: str) -> str | None:
        return _canonical(key, None, known)[0]

    given = {name(key) for key, value in above if value is not None}
    gone = {one if one not in given else other for one, other in ONE_OF if (one in given) != (other in given)}
    return [*((key, value) for key, value in below if name(key) not in gone), *above]


def with_preset(settings: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """What allocation.preset stands for, and then the settings that were given beside it, which win."""
    preset = PRESETS.get(str(dict(settings).get("allocation.preset")), {})
    return [*preset.items(), *settings]


def read_settings(path: Path) -> list[tuple[str, Any]]:
    """A YAML tree of settings → (dotted key, value).

    Raises:
        InputError: not a YAML mapping, or two values for one setting, also under names of other tools.
    """
    try:
        tree, lines = read_yaml(path.read_text(encoding="utf-8-sig"))
    except TwiceError as error:
        raise InputError(f"{path}: {error}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file: {' '.join(str(error).split())}.") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a recipe is a mapping of settings, this file holds {type(tree).__name__}.")
    settings = list(_flatten(tree))
    check_once(settings, str(path), lines)
    return settings


def check_once(
    settings: Sequence[tuple[str, Any]], where: str = "command line", lines: Mapping[str, list[int]] | None = None
) -> None:
    """
    Args:
        settings: (dotted key, value), of one place.
        lines: dotted key → the lines where it stands, of a file.

    Raises:
        InputError: one setting has two values, under whichever names.
    """
    known, lines = dict(setting_types()), lines or {}
    first: dict[str, tuple[str, Any, Any]] = {}
    for key, given in settings:
        canonical, value = _canonical(key, given, known)
        if canonical is None:
            continue
        other, other_given, other_value = first.setdefault(canonical, (key, given, value))
        if value != other_value and value == value:  # not a number is no other than itself
            earlier = f"{other}={other_given}" + (f" (line {lines[other][0]})" if other in lines else "")
            later = f"{key}={given}" + (f" (line {lines[key][-1]})" if key in lines else "")
            raise InputError(f"{where}: two values for {canonical}, {earlier} and {later}; keep one.")


def resolve(settings: Sequence[tuple[str, Any]], *, origin: str) -> Recipe:
    """Builds a Recipe from (dotted key, value) settings, later ones winning; `origin` names them in errors."""
    known = dict(setting_types())
    problems: list[str] = []
    tree: dict[str, Any] = {}
    for key, value in settings:
        canonical, value = _canonical(key, value, known)
        if canonical is None:
            first = next((name for name in known if name.startswith(f"{key}.")), None)
            told = f"{key}={value!r}: a section; write its settings by their own names, such as {first}"
            problems.append(told if first else f"{key}: unknown setting{_advice(key, known)}")
            continue
        *parents, leaf = canonical.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problems += _describe(error, known)
    if problems:
        raise InputError(f"{origin}: " + "; ".join(problems) + ".")
    return recipe


def parse_overrides(
    arguments: Sequence[str], sections: Sequence[str] = tuple(Recipe.model_fields)
) -> list[tuple[str, Any]]:
    """`--key value`, `--key=value`, `--flag` and `key=value` → (key, value), values parsed as YAML.

    Args:
        sections: of the recipe, those that the command reads.

    Raises:
        InputError: a word that is none of these, a value that is not YAML, or a setting of another section.
    """
    overrides, rest, known = [], list(arguments), dict(setting_types())
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not equals:
            if not word.startswith("--"):
                raise InputError(f"{word}: not an option; write key=value or --key value.")
            text = rest.pop(0) if rest and not _starts_setting(rest[0]) else "true"
        canonical, _ = _canonical(key, None, known)
        if canonical and canonical.split(".")[0] not in sections:
            raise InputError(f"{key}: has no effect here; settings of {', '.join(sections)} can follow.")
        overrides.append((key, _parsed(key, text, known.get(canonical or ""))))
    return overrides


def _parsed(key: str, text: str, annotation: Any) -> Any:
    """The value of an override: YAML, but a text, a path above all, as it stands where it is neither null nor in quotes."""
    a_text = annotation in (str, str | None, str | list[str], str | list[str] | None)
    a_list = _is_list(annotation) and text.startswith("[") and text.endswith("]")
    if a_text and not a_list and text not in ("", "null") and text[:1] not in "\"'":
        return text
    try:
        return read_yaml(text)[0]
    except TwiceError as error:
        raise InputError(f"{key}: {error}.") from None
    except yaml.YAMLError:
        if str in _options(annotation):  # such as a pattern, [ab].jsonl
            return text
        raise InputError(f"{key}: the value {text!r} is not valid YAML; quote it.") from None


def setting_types(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every setting."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from setting_types(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", annotation


def _starts_setting(word: str) -> bool:
    key, equals, _ = word.partition("=")
    return word.startswith("--") or bool(equals and _canonical(key, None, dict(setting_types()))[0])


def _canonical(key: str, value: Any, known: Mapping[str, Any]) -> tuple[str | None, Any]:
    """The canonical name and value of a setting spelled our way or another tool's way; None when unknown."""
    section, _, leaf = key.rpartition(".")
    canonical = key if key in known else ALIASES.get(leaf)
    if canonical is None or section not in ("", canonical.rpartition(".")[0]):
        return None, value
    if leaf == "mask_prompt" and isinstance(value, bool):
        value = not value
    elif leaf in ("bits", "quantization_bit") and isinstance(value, int):
        value = {4: True, 16: False, 32: False}.get(value, value)
    elif isinstance(value, str):
        value = VALUE_ALIASES.get(canonical, {}).get(value, value)
        whole = canonical in SOURCES or (canonical == "lora.target_modules" and _is_expression(value))
        if _is_list(known[canonical]) and not whole:
            value = [] if value == "none" else [part.strip() for part in value.split(",")]
    return canonical, value


def _is_expression(targets: str) -> bool:
    return targets == EVERY or re.fullmatch(r"[\w.\-, ]*", targets) is None


def _is_list(annotation: Any) -> bool:
    return any(typing.get_origin(option) is list for option in _options(annotation))


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    known = dict(setting_types())
    sections = {name.rpartition(".")[0] for name in known}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if dotted in sections and value is None:  # all its lines are comments
            continue
        if isinstance(value, Mapping) and dotted not in known:
            yield from _flatten(value, f"{dotted}.")
        else:
            yield dotted, value


def _describe(error: ValidationError, known: Mapping[str, Any]) -> list[str]:
    """One problem a setting, though a setting of several types fails once for each of them."""
    problems: dict[str, list[str]] = {}
    for e in error.errors():
        message = e["msg"].removeprefix("Value error, ")
        dotted = [".".join(map(str, e["loc"][:end])) for end in range(1, len(e["loc"]) + 1)]
        if not dotted:
            problems[message] = []
            continue
        where = next((name for name in dotted if name in known), dotted[-1])
        problems.setdefault(f"{where}={e['input']!r}: ", []).append(f"{message[0].lower()}{message[1:]}")
    return [where + ", or ".join(messages) for where, messages in problems.items()]


def _advice(key: str, known: Mapping[str, Any]) -> str:
    """What to write instead: what the other tools' name means here, else the name that is spelled most like it."""
    leaf = key.rpartition(".")[2]
    if leaf in ALIASES and leaf not in known:
        return f", did you mean {ALIASES[leaf]}?"
    return advice(leaf) or _nearest(key, [*known, *ALIASES])


def _nearest(word: str, names: Sequence[str]) -> str:
    """`; did you mean …?`: the name that is spelled most like `word`, also when only its last part is."""
    leaves = {name.rsplit(".", 1)[-1]: name for name in names}
    leaf = word.rsplit(".", 1)[-1]
    by_leaf = [leaves[match] for match in difflib.get_close_matches(leaf, leaves, 1, 0.7)]
    whole = difflib.get_close_matches(word, names, 1, 0.6)
    match = ([leaves[leaf]] if leaf in leaves else []) or whole or by_leaf
    return f", did you mean {match[0]}?" if match else ""
