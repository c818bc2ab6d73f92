"""Option names of TRL and other trainers, with their replacements here.

``docs/from_trl.md`` explains the same rows; a test compares both with each other, with TRL's config
classes, and with the options that exist.
"""

from __future__ import annotations

from collections.abc import Mapping

_LENGTHS = "--data.max_prompt_length and --data.max_response_length"
_PACKING = "--model.packing (on by default)"
_COLUMNS = "--data.prompt_column, --data.response_column and --data.messages_column"
_VLLM_ENGINE = "--model.engine VLLMEngine"
_VLLM_SERVER = "--model.engine VLLMServer"
_QUANTISED = "nothing: give --model.student a folder that is quantised already"
_ADAPTER = "--model.student_adapter LoraConfig"
_ABSENT = "nothing: "
_NONE = "nothing: responses are sampled from the student itself (see --data.sampling)"

TRL: Mapping[str, str] = {
    # GKDConfig and DistillationConfig
    "temperature": "--data.sampling.temperature for responses, --method.temperature for the loss",
    "lmbda": "--method.on_policy_fraction",
    "beta": "--method.beta of --method GKD",
    "max_new_tokens": "--data.max_response_length",
    "max_completion_length": "--data.max_response_length",
    "teacher_model_name_or_path": "--model.teacher",
    "teacher_model_revision": "--model.teacher",
    "teacher_model_init_kwargs": "--model.teacher_dtype and --model.attn_implementation",
    "disable_dropout": "the student's own config (--model.student)",
    "seq_kd": "--method.seq_kd",
    "top_p": "--data.sampling.top_p",
    "top_k": "--data.sampling.top_k",
    "min_p": _NONE,
    "repetition_penalty": _NONE,
    "generation_kwargs": _NONE,
    "cache_implementation": _NONE,
    "max_tool_calling_iterations": "--data.max_turns with --data.tools",
    "chat_template_kwargs": "--data.chat_template_kwargs",
    "trust_remote_code": "nothing: code from the hub is not run",
    "shuffle_dataset": "nothing: rows are always shuffled, by --seed_everything",
    "ds3_gather_for_generation": "the rollouts setting of --trainer.strategy fsdp2",
    "use_vllm": _VLLM_ENGINE,
    "vllm_mode": f"{_VLLM_ENGINE}, or VLLMServer",
    "vllm_model_impl": "engine_args of --model.engine VLLMEngine",
    "vllm_structured_outputs_regex": "engine_args of --model.engine VLLMEngine",
    "vllm_tensor_parallel_size": "engine_args of --model.engine VLLMEngine",
    "vllm_group_port": _VLLM_SERVER,
    "vllm_enable_sleep_mode": "--model.engine.sleep of VLLMEngine",
    "vllm_gpu_memory_utilization": "--model.engine.gpu_memory_utilization of VLLMEngine",
    "vllm_max_model_length": "--model.engine.max_model_len of VLLMEngine",
    "vllm_server_base_url": "--model.engine.url of VLLMServer",
    "vllm_server_host": "--model.engine.url of VLLMServer",
    "vllm_server_port": "--model.engine.url of VLLMServer",
    "vllm_server_timeout": "--model.engine.timeout_seconds of VLLMServer",
    "log_completions": "nothing: rollouts.jsonl of the run folder has them",
    "num_completions_to_print": "--trainer.callbacks+=SampleTable",
    "log_unique_prompts": "--trainer.callbacks+=SampleTable",
    # SFTConfig
    "max_length": _LENGTHS,
    "truncation_mode": _LENGTHS,
    "completion_only_loss": "nothing: loss lies on responses alone",
    "assistant_only_loss": "nothing: loss lies on responses alone",
    "packing": _PACKING,
    "packing_strategy": _PACKING,
    "padding_free": _PACKING,
    "eval_packing": _PACKING,
    "pad_to_multiple_of": _PACKING,
    "dataset_text_field": _COLUMNS,
    "dataset_kwargs": _COLUMNS,
    "dataset_num_proc": "nothing: tokenized rows are kept in --data.token_cache",
    "chat_template_path": "a tokenizer's folder: --model.tokenizer",
    "eos_token": "a tokenizer's folder: --model.tokenizer",
    "pad_token": "a tokenizer's folder: --model.tokenizer",
    "loss_type": "--method",
    "router_aux_loss_coef": "nothing: the loss is the method's alone",
    "activation_offloading": "--model.gradient_checkpointing true, which recomputes instead",
    "model_init_kwargs": "--model.dtype and --model.attn_implementation",
    # TrainingArguments
    "output_dir": "--trainer.default_root_dir",
    "learning_rate": "--model.learning_rate",
    "lr_scheduler_type": "--model.schedule",
    "lr_scheduler_kwargs": "--model.lr_scheduler",
    "warmup_steps": "--model.warmup_steps",
    "weight_decay": "--model.weight_decay",
    "optim": "--model.optimizer",
    "optim_args": "--model.optimizer",
    "adam_beta1": "--model.optimizer AdamW with --model.optimizer.betas",
    "adam_beta2": "--model.optimizer AdamW with --model.optimizer.betas",
    "adam_epsilon": "--model.optimizer AdamW with --model.optimizer.eps",
    "max_grad_norm": "--trainer.gradient_clip_val",
    "per_device_train_batch_size": "--data.batch_size",
    "per_device_eval_batch_size": "--data.batch_size",
    "gradient_accumulation_steps": "--data.global_batch_size, rows of an optimizer step",
    "bf16": "--trainer.precision bf16-mixed",
    "fp16": "--trainer.precision 16-mixed",
    "gradient_checkpointing": "--model.gradient_checkpointing",
    "activation_checkpointing": "--model.gradient_checkpointing",
    "torch_compile": "--model.compile_blocks true",
    "use_liger_kernel": "nothing: the loss is computed tile by tile (--model.tile_positions)",
    "num_train_epochs": "--trainer.max_epochs",
    "max_steps": "--trainer.max_steps",
    "eval_strategy": "--data.val and --trainer.val_check_interval, in optimizer steps",
    "eval_steps": "--data.val and --trainer.val_check_interval, in optimizer steps",
    "logging_steps": "--trainer.log_every_n_steps",
    "report_to": "--trainer.logger, such as WandbLogger",
    "run_name": "the logger's own setting: --trainer.logger",
    "disable_tqdm": "--trainer.enable_progress_bar false",
    "save_steps": "--trainer.callbacks+=LastCheckpoint with its every_n_steps",
    "save_strategy": "--trainer.callbacks+=LastCheckpoint with its every_n_steps",
    "save_total_limit": "--trainer.callbacks+=LastCheckpoint with its keep",
    "load_best_model_at_end": "nothing: best-step=N.ckpt is kept next to last.ckpt",
    "metric_for_best_model": "--trainer.callbacks+=BestCheckpoint with its metric",
    "resume_from_checkpoint": "--ckpt_path last",
    "seed": "--seed_everything",
    "data_seed": "--data.seed",
    "use_cpu": "--trainer.accelerator cpu",
    "full_determinism": "--trainer.deterministic true",
    "dataloader_num_workers": "nothing: rows are tokenized once, in the training process",
    "deepspeed": "--trainer.strategy fsdp2",
    "fsdp": "--trainer.strategy fsdp2",
    "ddp_timeout": "--trainer.strategy DDPStrategy with its timeout",
    "push_to_hub": "okd-lightning export, and the hub's own upload",
    # ModelConfig and ScriptArguments
    "model_name_or_path": "--model.student",
    "model_revision": "--model.student",
    "dtype": "--model.dtype",
    "attn_implementation": "--model.attn_implementation",
    "use_peft": _ADAPTER,
    "lora_r": f"{_ADAPTER} with --model.student_adapter.r",
    "lora_alpha": f"{_ADAPTER} with --model.student_adapter.lora_alpha",
    "lora_dropout": f"{_ADAPTER} with --model.student_adapter.lora_dropout",
    "lora_target_modules": f"{_ADAPTER} with --model.student_adapter.target_modules",
    "load_in_8bit": _QUANTISED,
    "load_in_4bit": _QUANTISED,
    "dataset_name": "--data.train, a file, a folder or a hub id",
    "dataset_config": "--data.subset",
    "dataset_train_split": "--data.train_split",
    "dataset_test_split": "--data.test_split",
}
"""Option of GKDConfig, DistillationConfig, SFTConfig, TrainingArguments, ... → its replacement."""

OTHERS: Mapping[str, str] = {
    "lr": "--model.learning_rate",
    "lambda": "--method.on_policy_fraction",
    "alpha": "--method.alpha of --method OKD",
    "scheduler": "--model.schedule, or a class as --model.lr_scheduler",
    "lr_schedule": "--model.schedule",
    "warmup": "--model.warmup_steps",
    "warmup_ratio": "--model.warmup_steps, in optimizer steps",
    "epochs": "--trainer.max_epochs",
    "num_epochs": "--trainer.max_epochs",
    "batch_size": "--data.batch_size",
    "train_batch_size": "--data.global_batch_size, rows of an optimizer step",
    "accumulate_grad_batches": "--trainer.accumulate_grad_batches",
    "clip_grad": "--trainer.gradient_clip_val",
    "grad_clip": "--trainer.gradient_clip_val",
    "max_tokens": "--data.max_response_length",
    "max_prompt_length": "--data.max_prompt_length",
    "max_seq_length": _LENGTHS,
    "num_generations": "--data.samples_per_prompt",
    "iw_opd_gamma": "--method.gamma of --method callbacks.iwopd.IWOPD",
    "peft_config": _ADAPTER,
    "lora": _ADAPTER,
    "logger": "--trainer.logger",
    "wandb": "--trainer.logger WandbLogger",
    "train_file": "--data.train",
    "train_data": "--data.train",
    "eval_dataset": "--data.val",
    "train_dataset": "--data.train",
    "validation_file": "--data.val",
    "torch_dtype": "--model.dtype",
    "teacher_model": "--model.teacher",
    "student_model": "--model.student",
    "student": "--model.student",
    "teacher": "--model.teacher",
    "divergence": "--method.divergence",
    "devices": "--trainer.devices",
    "gpus": "--trainer.devices",
    "precision": "--trainer.precision",
    "ema": "--model.teacher AveragedSelf",
    "resume": "--ckpt_path last",
    "checkpoint": "--ckpt_path",
}
"""Short and common names that no config class of TRL has → their replacements."""


def hint_for(given: str) -> str | None:
    """Return the replacement of another trainer's option; None for an unknown name.

    Args:
        given: As it was typed, with or without dashes, section and value.
    """
    typed = given.lstrip("-").partition("=")[0].replace("-", "_")
    name = typed.rpartition(".")[2].lower()
    found = TRL.get(name) or OTHERS.get(name)
    if found is None or found == f"--{typed}":
        return None
    is_absent = found.startswith(_ABSENT)
    return f"no such option here: {found[len(_ABSENT) :]}" if is_absent else f"here it is {found}"
