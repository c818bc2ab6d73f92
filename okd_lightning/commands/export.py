"""Export of a checkpoint as a plain Hugging Face folder that does not need this library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import yaml
from torch import nn
from transformers import PreTrainedModel

from okd_lightning import __version__
from okd_lightning.bounded_files import load_yaml
from okd_lightning.checkpoints.contents import check_finite
from okd_lightning.commands.model_folder import check_model_folder, replaced_model
from okd_lightning.errors import CheckpointError, ConfigError
from okd_lightning.models import ModelSource, load_causal_lm, load_model_config, merge_adapters
from okd_lightning.models.adapter_folders import adapter_folder
from okd_lightning.models.generation_settings import save_with_settings
from okd_lightning.models.sources import Source, locate
from okd_lightning.records.requests import Generator
from okd_lightning.teachers import OnlineModuleSettings
from okd_lightning.training.arguments import peft_config_of
from okd_lightning.training.earlier_options import present_model
from okd_lightning.training.module import DistillationModule

ExportPart: TypeAlias = Literal["student", "online_module"]
AdapterForm: TypeAlias = Literal["merged", "apart"]
StoredFormat: TypeAlias = Literal["float32", "bfloat16", "float16"]


def export_student(
    module: DistillationModule,
    checkpoint: Mapping[str, Any],
    out: Path,
    adapter: AdapterForm = "merged",
    overwrite: bool = False,
    dtype: StoredFormat | None = None,
) -> None:
    """Write the student of a checkpoint: safetensors, tokenizer, generation config, model card.

    Generation settings are those of the student's own folder, with the run's end and pad ids.

    Args:
        module: Built from the checkpoint's config; its weights are loaded here.
        checkpoint: From ``read_checkpoint``.
        out: The folder to write.
        adapter: Whether a student's adapter is merged into its base, or written as a PEFT folder.
        overwrite: Write also into a folder that holds something other than an export.
        dtype: Number format of the written weights; by default that of training.

    Raises:
        CheckpointError: The checkpoint is of another model.
        ConfigError: ``adapter`` is "apart", and PEFT cannot load the base.
        OutputError: The folder cannot be written, is that of a model the run begins with, or holds
            something else.
        NonFiniteError: A weight is NaN or infinite. What ``out`` held before is untouched.
    """
    _check_out(out, module, overwrite)
    if adapter == "apart":
        _check_base(module)
    module.configure_model()
    module.on_load_checkpoint(dict(checkpoint))
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    assert module.student is not None
    student = module.student.eval()
    is_apart = module.pair.student_adapter is not None and adapter == "apart"
    if module.pair.student_adapter is not None and not is_apart:
        student = _merged(module)
    stored = _stored_adapter(student, dtype) if is_apart else _stored(student, dtype)
    check_finite(stored, f"--out {str(out)!r}")
    with replaced_model(out) as folder:
        save_with_settings(
            student,
            folder,
            bos_token_id=module.tokenizer.bos_token_id,
            eos_token_id=list(module.eos_ids),
            pad_token_id=_pad_id(module),
        )
        module.tokenizer.save_pretrained(folder)
        _save_processor(module, "student", folder)
        (folder / "README.md").write_text(model_card(checkpoint))


def export_online_module(
    module: DistillationModule,
    checkpoint: Mapping[str, Any],
    out: Path,
    overwrite: bool = False,
    dtype: StoredFormat | None = None,
) -> None:
    """Write the teacher's online module as a PEFT folder, with the tokenizer and base config.

    ``PeftModel.from_pretrained(teacher, out)`` loads it; a LoRA module's folder can also be given
    as ``--model.teacher``.

    Args:
        module: Built from the checkpoint's config; its weights are loaded here.
        checkpoint: From ``read_checkpoint``.
        out: The folder to write.
        overwrite: Write also into a folder that holds something other than an export.
        dtype: Number format of the written weights; by default that of training.

    Raises:
        CheckpointError: The checkpoint holds no online module, or is of another model.
        OutputError: The folder cannot be written, is that of a model the run begins with, or holds
            something else.
        NonFiniteError: A weight is NaN or infinite. What ``out`` held before is untouched.
    """
    config = checkpoint["okd_lightning"].get("online_module")
    if config is None:
        raise CheckpointError(
            "this checkpoint holds no online module: only a run of OKD trains one; "
            "export the student with --what student"
        )
    _check_out(out, module, overwrite)
    module.add_online_module(OnlineModuleSettings(peft_config_of(config)))
    module.configure_model()
    module.on_load_checkpoint(dict(checkpoint))
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    found = module.pair.teacher.adapted_models
    if len(found) != 1:
        raise ConfigError(
            f"{type(module.pair.teacher).__name__} trained {len(found)} online modules, one on "
            "each model, and --what online_module writes one: train with one teacher, or export "
            "the student with --what student"
        )
    ((teacher, base),) = found
    source = _located(base, "--model.teacher")
    configs: dict[str, Any] = dict(teacher.peft_config)
    for own in configs.values():
        own.base_model_name_or_path = source.given if source.gguf_file else source.name
        own.revision = source.revision
    check_finite(_stored_adapter(teacher, dtype), f"--out {str(out)!r}")
    with replaced_model(out) as folder:
        teacher.save_pretrained(folder)
        teacher.config.save_pretrained(folder)
        module.tokenizer.save_pretrained(folder)
        _save_processor(module, "teacher", folder)


def _save_processor(module: DistillationModule, generator: Generator, folder: Path) -> None:
    reader = module.pair.images.reader_of(generator)
    if reader is not None:
        reader.save(folder)


def model_card(checkpoint: Mapping[str, Any]) -> str:
    """Return the card of an exported student: method, models, data and the measures."""
    own = checkpoint["okd_lightning"]
    config = load_yaml(own["config"] or "{}")
    model, data = config.get("model", {}), config.get("data", {})
    method = config.get("method") or (config.get("trainer") or {}).get("callbacks")
    settings = yaml.safe_dump(method or list(own["methods"]), sort_keys=False).strip()
    rows = [f"| {name} | {value:.4f} |" for name, value in sorted(own["metrics"].items())]
    measured = ["| measure | value |", "|---|---|", *rows] if rows else ["None were taken."]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [knowledge-distillation, okd-lightning]",
            "---",
            "",
            "# Distilled student",
            "",
            f"Trained with okd-lightning {__version__} by {' + '.join(own['methods'])} for "
            f"{checkpoint['global_step']} optimizer steps.",
            "",
            f"* student: `{_shown(model.get('student'))}`",
            f"* teacher: {_teacher(model)}",
            f"* training data: `{data.get('train')}`",
            f"* validation data: `{data.get('val')}`",
            "",
            "## Method",
            "",
            "```yaml",
            settings,
            "```",
            "",
            "## Measured",
            "",
            "Validation at this checkpoint, in nats per token; KL and agreement are against the "
            "base teacher at temperature 1.",
            "",
            *measured,
            "",
        ]
    )


def _located(source: ModelSource | None, option: str) -> Source:
    return locate(source, option) if isinstance(source, str) else Source(str(source), str(source))


def _check_base(module: DistillationModule) -> None:
    """Refuse to write an adapter alone whose base no PEFT folder can name.

    Raises:
        ConfigError: The base is itself an adapter merged into another, or a GGUF file.
    """
    option = "--model.student"
    source = _located(module.pair.student_source, option)
    is_merged = isinstance(module.pair.student_source, str) and adapter_folder(source, option)
    if source.gguf_file is not None or is_merged:
        raise ConfigError(
            f"--adapter apart: the student's adapter was trained on {option} {source.given!r}, "
            f"{'a GGUF file' if source.gguf_file else 'an adapter merged into its base'}, which "
            "PEFT cannot load as a base; use --adapter merged"
        )


def _stored(model: nn.Module, dtype: StoredFormat | None) -> dict[str, nn.Parameter]:
    """Convert a model to the written format; return its parameters."""
    if dtype is not None:
        model.to(dtype=getattr(torch, dtype))
    return dict(model.named_parameters())


def _stored_adapter(model: nn.Module, dtype: StoredFormat | None) -> dict[str, nn.Parameter]:
    """Convert a model's adapter to the written format; return its parameters.

    The base stays as it is: it is not in a PEFT folder, and a quantised one has no other format.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if dtype is not None:
        for parameter in trained.values():
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return trained


def _check_out(out: Path, module: DistillationModule, overwrite: bool) -> None:
    """Refuse an output folder from which a model is loaded: older weights in it are removed."""
    teacher = module.pair.teacher
    sources = {
        "--model.student": module.pair.student_source,
        "--model.teacher": teacher.source,
        **{f"--model.teacher.teachers {one}": one for one in teacher.own_sources[1:]},
    }
    named = {option: s for option, s in sources.items() if isinstance(s, str)}
    check_model_folder(out, named, overwrite)


def _merged(module: DistillationModule) -> PreTrainedModel:
    """Return a plain model with the adapter merged in; the module's own student is consumed."""
    assert module.student is not None
    option = "--model.student"
    config = load_model_config(module.pair.student_source, option, module.vocabulary.size)
    if merge_adapters(module.student):
        config.tie_word_embeddings = False
    plain = load_causal_lm({}, config, option, dtype=module.pair.dtype)  # weights are loaded below
    plain.load_state_dict(module.student.state_dict())
    plain.generation_config = module.student.generation_config
    return plain.eval()


def _pad_id(module: DistillationModule) -> int:
    pad = module.tokenizer.pad_token_id
    return module.eos_ids[0] if pad is None else pad


def _teacher(model: Mapping[str, Any]) -> str:
    given = present_model(model).get("teacher")
    if not isinstance(given, Mapping) or "class_path" not in given:
        return f"`{_shown(given)}`"
    kind, settings = str(given["class_path"]).rpartition(".")[2], given.get("init_args") or {}
    own = settings.get("model") or settings.get("teachers")
    return kind if own is None else f"{kind} of {_listed(own)}"


def _listed(sources: Any) -> str:
    if isinstance(sources, list):
        return ", ".join(map(_listed, sources))
    if isinstance(sources, Mapping) and "class_path" in sources:
        return _teacher({"teacher": sources})
    if isinstance(sources, Mapping) and "model_type" not in sources:
        return ", ".join(f"{name}: {_listed(one)}" for name, one in sources.items())
    return f"`{_shown(sources)}`"


def _shown(source: Any) -> str:
    if isinstance(source, Mapping):
        return f"random {source.get('model_type')}"
    return str(source)
