"""What settings of other tools are called here, and why some are not there. Torch-free.

Names whose meaning is equal are aliases (spellings.py). These mean something near, or nothing: transformers' and TRL's
arguments, PEFT's config, axolotl's, LLaMA-Factory's, Unsloth's, torchtune's and litgpt's settings.
"""

from __future__ import annotations

NEAR = {
    "hub_token": "HF_TOKEN in the environment, or `hf auth login`",
    "hub_strategy": "push_to_hub, which sends the adapter once, at the end",
    "save_to_hub": "push_to_hub",
    "batch_size": (
        "training.micro_batch_size (rows a forward), training.gradient_accumulation_steps or evaluation.batch_size"
    ),
    "global_batch_size": "training.gradient_accumulation_steps (times training.micro_batch_size)",
    "bf16": "quantization.bnb_4bit_compute_dtype=bfloat16",
    "fp16": "quantization.bnb_4bit_compute_dtype=float16",
    "fp32": "quantization.bnb_4bit_compute_dtype=float32",
    "pure_bf16": "quantization.bnb_4bit_compute_dtype=bfloat16",
    "dtype": "quantization.bnb_4bit_compute_dtype",
    "torch_dtype": "quantization.bnb_4bit_compute_dtype",
    "precision": "quantization.bnb_4bit_compute_dtype",
    "mixed_precision": "quantization.bnb_4bit_compute_dtype",
    "load_in_16bit": "quantization.load_in_4bit=false",
    "full_precision": "quantization.load_in_4bit=false",
    "max_length": "data.max_seq_len",
    "block_size": "data.max_seq_len",
    "model_max_length": "data.max_seq_len",
    "n_ctx": "data.max_seq_len",
    "dataset_text_field": "data.columns={NAME: text}",
    "field_instruction": "data.columns={NAME: instruction}",
    "field_input": "data.columns={NAME: input}",
    "field_output": "data.columns={NAME: output}",
    "field_messages": "data.columns={NAME: messages}",
    "column_map": "data.columns",
    "test_datasets": "data.validation",
    "completion_only_loss": "data.train_on_inputs=false",
    "assistant_only_loss": "data.train_on_inputs=false",
    "response_template": "data.train_on_inputs=false",
    "only_last_turn": "data.mask_history",
    "template": "data.chat_template, or data.prompt_template outside chats",
    "prompt_style": "data.prompt_template or data.chat",
    "lora_target_linear": "lora.target_modules=all-linear",
    "target_linear": "lora.target_modules=all-linear",
    "lora_attn_modules": "lora.target_modules",
    "apply_lora_to_mlp": "lora.target_modules",
    "target_parameters": "lora.target_modules",
    "freeze_trainable_layers": "lora.layers_to_transform",
    "init_lora_weights": "lora.init",
    "peft_init_lora_weights": "lora.init",
    "pissa_init": "lora.init",
    "loftq_config": "lora.init=quantization",
    "rank_pattern": "allocation.start and allocation.rounds, which give every module its rank",
    "alpha_pattern": "lora.alpha",
    "target_r": "lora.r, which the budget follows",
    "init_r": "lora.r",
    "tinit": "allocation.warmup",
    "deltaT": "allocation.interval",
    "cosine_min_lr_ratio": (
        "training.lr_scheduler_type=cosine_with_min_lr and training.lr_scheduler_kwargs={min_lr_rate: …}"
    ),
    "min_lr": "training.lr_scheduler_type=cosine_with_min_lr and training.lr_scheduler_kwargs={min_lr: …}",
    "decay_steps": (
        "training.lr_scheduler_type=warmup_stable_decay and training.lr_scheduler_kwargs={num_decay_steps: …}"
    ),
    "lr_warmup": "training.warmup_steps",
    "warmup": "training.warmup_steps or training.warmup_ratio",
    "max_epochs": "training.num_epochs",
    "evals_per_epoch": "training.eval_strategy=epoch, or training.eval_steps as a share of the run",
    "saves_per_epoch": "training.save_strategy=epoch, or training.save_steps as a share of the run",
    "eval_on_start": "evaluation.before",
    "do_eval": "evaluation.before, evaluation.after or training.eval_strategy",
    "save_every": "training.save_steps",
    "log_every_n_steps": "logging.steps",
    "activation_checkpointing": "training.gradient_checkpointing",
    "enable_activation_checkpointing": "training.gradient_checkpointing",
    "enable_activation_offloading": "training.gradient_checkpointing=offload",
    "activation_offloading": "training.gradient_checkpointing=offload",
    "length_column_name": "training.group_by_length",
    "train_sampling_strategy": "training.group_by_length",
    "auto_find_batch_size": "training.fit=auto",
    "tiled_mlp": "training.mlp_tile",
    "early_stopping": "training.early_stopping_patience",
    "random_state": "training.seed",
    "data_seed": "training.seed",
    "merge_lora": "merge",
    "save_merged": "merge",
    "predict_with_generate": "evaluation.metrics (exact_match and rougeL generate)",
    "compute_accuracy": "evaluation.metrics=loss,accuracy",
    "generation_max_length": "evaluation.max_new_tokens",
    "resume_from_checkpoint": "the flag --resume-from-checkpoint",
    "auto_resume_from_checkpoints": "the flag --resume-from-checkpoint auto",
    "overwrite_output_dir": "the flag --overwrite",
    "gptq": "quantization.bnb_4bit_quant_type",
}

_ONE_PROCESS = "one process trains on one device"
_ONE_ATTENTION = "attention is torch's, with its fused kernels where they can be"
_FIXED_ADAM = "betas (0.9, 0.999) and epsilon (1e-8) are fixed"
_BEST = "the weights of the best validation loss are the result wherever validations and checkpoints are made"
_ALL_LORA = "every adapter is a plain LoRA in PEFT's form"
_NOT_NEEDED = "qalora needs none"
_ENVIRONMENT = "the tracker reads its own environment variables"
_KNOWN = "LLaMA-class models are all that is trained"

NONE = {
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "fsdp_version", "ddp_find_unused_parameters", "ddp_timeout", "ddp_backend",
         "local_rank", "tensor_parallel_degree", "context_parallel_size", "dp_shard_size", "parallelism_config",
         "accelerator_config", "device_map", "max_memory", "gpu_memory_limit", "nproc_per_node", "num_gpus", "devices"),
        _ONE_PROCESS,
    ),
    **dict.fromkeys(
        ("flash_attention", "flash_attn", "attn_implementation", "attn_impl", "use_flash_attention_2",
         "xformers_attention", "sdp_attention", "sdpa_attention", "use_liger_kernel", "enable_liger_kernel",
         "use_unsloth", "torch_compile", "compile"),
        _ONE_ATTENTION,
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon", "betas", "optim_args"), _FIXED_ADAM),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _BEST),
    **dict.fromkeys(
        ("use_rslora", "peft_use_rslora", "use_dora", "peft_use_dora", "use_qalora", "lora_bias", "bias",
         "modules_to_save", "lora_modules_to_save", "additional_target", "additional_trainable", "finetuning_type",
         "peft_type", "adapter", "lora_fan_in_fan_out", "fan_in_fan_out", "loraplus_lr_ratio", "loraplus_lr_embedding",
         "galore_rank", "use_galore", "use_badam", "layer_replication", "megatron_config", "trainable_token_indices",
         "train_norms", "train_embeddings"),
        _ALL_LORA,
    ),
    **dict.fromkeys(
        ("layers_pattern", "task_type", "inference_mode", "do_train", "do_predict", "stage", "remove_unused_columns",
         "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "preprocessing_num_workers",
         "dataset_num_proc", "dataset_processes", "dataset_prepared_path", "dataset_kwargs", "overwrite_cache",
         "save_safetensors", "save_only_model", "gradient_checkpointing_kwargs", "upcast_layernorm",
         "pad_to_sequence_len", "pad_to_multiple_of", "bnb_4bit_quant_storage", "disable_gradient_checkpointing",
         "include_num_input_tokens_seen", "tf32", "strict"),
        _NOT_NEEDED,
    ),
    **dict.fromkeys(
        ("wandb_project", "wandb_entity", "wandb_name", "wandb_run_id", "wandb_watch", "wandb_log_model", "run_name",
         "mlflow_tracking_uri", "comet_project_name"),
        _ENVIRONMENT,
    ),
    **dict.fromkeys(("model_type", "tokenizer_type", "tokenizer_name", "is_llama_derived_model"), _KNOWN),
    "trust_remote_code": "no code of a model's is ever run",
    "load_in_8bit": "a base is in 4 bits, or whole with quantization.load_in_4bit=false",
    "fp8": "a base is in 4 bits, or whole with quantization.load_in_4bit=false",
    "eval_packing": "validation rows are never packed",
    "eval_sample_packing": "validation rows are never packed",
    "logging_strategy": "a line is logged every logging.steps",
    "logging_first_step": "a line is logged every logging.steps",
    "special_tokens": "the vocabulary stays the base's",
    "add_tokens": "the vocabulary stays the base's",
    "resize_vocab": "the vocabulary stays the base's",
    "resize_token_embeddings_to_32x": "the vocabulary stays the base's",
}  # fmt: skip


def advice(name: str) -> str:
    """`, did you mean …?` or the reason why there is no such setting, for a setting of another tool's; "" for any other
    name."""
    if name in NEAR:
        return f", did you mean {NEAR[name]}?"
    return f" (leave it out: {NONE[name]})" if name in NONE else ""
