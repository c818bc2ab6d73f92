"""Tiny vision-language models of several families with their processors, and rows with images.

Width 32, two layers on each side. The images are a few pixels wide, so that one of them expands to
a handful of tokens.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

SPECIAL = ("<pad>", "<eos>", "<bos>", "<image>")
IMAGE_ID = 3
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n:.UAS"

_IDEFICS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
_IDEFICS += tuple(f"<row_{i}_col_{j}>" for i in range(1, 3) for j in range(1, 3))
_GEMMA = ("<start_of_image>", "<end_of_image>")
_QWEN = ("<|vision_start|>", "<|vision_end|>", "<|video_pad|>")

_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.3,
}

_TEMPLATE = (
    "{% for m in messages %}"
    "{{ {'user': 'U', 'assistant': 'A', 'system': 'S'}[m['role']] + ':' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


def make_tokenizer(family: str = "llava") -> PreTrainedTokenizerFast:
    """Return a tokenizer of one id per letter, after the special tokens of the family."""
    special, own = list(SPECIAL), {"image_token": "<image>"}
    placeholder = "<image>"
    if family in ("idefics3", "smolvlm"):
        special += _IDEFICS
    elif family == "gemma3":
        special += _GEMMA
        own |= {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
        placeholder = "<start_of_image>"
    elif family.startswith("qwen"):
        special[IMAGE_ID] = "<|image_pad|>"
        special += _QWEN
        own = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
        placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    vocabulary = {token: i for i, token in enumerate([*special, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        additional_special_tokens=special[IMAGE_ID:],
        extra_special_tokens=own,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = _TEMPLATE.replace("IMAGE", placeholder)
    return made


def _idefics(kind: Callable[..., Any]) -> Callable[[Any, int], ProcessorMixin]:
    def make(tokenizer: Any, size: int) -> ProcessorMixin:
        images = kind(
            size={"longest_edge": size},
            max_image_size={"longest_edge": 16},
            do_image_splitting=True,
        )
        return Idefics3Processor(images, tokenizer, image_seq_len=4)

    return make


def _llava(tokenizer: Any, size: int) -> ProcessorMixin:
    images = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _gemma(tokenizer: Any, size: int) -> ProcessorMixin:
    images = Gemma3ImageProcessorPil(size={"height": size, "width": size}, image_seq_length=4)
    return Gemma3Processor(images, tokenizer, image_seq_length=4)


PROCESSORS: dict[str, Callable[[Any, int], ProcessorMixin]] = {
    "idefics3": _idefics(Idefics3ImageProcessorPil),
    "llava": _llava,
    "gemma3": _gemma,
}


def _qwen(tokenizer: Any) -> dict[str, Any]:
    ids = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": IMAGE_ID,
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }


def config_of(family: str, tokenizer: Any, **text: Any) -> Any:
    """Return the config of a tiny model of a family."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    own = {**_TEXT, "vocab_size": len(tokenizer) + 5, **text}
    about: dict[str, Any] = {"text_config": own, "vision_config": dict(_VISION)}
    ends = {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
    if family in ("idefics3", "smolvlm"):
        own["model_type"] = "llama"
        about |= {"image_token_id": IMAGE_ID, "scale_factor": 2}
    elif family == "llava":
        own["model_type"] = "llama"
        about["vision_config"] |= {"model_type": "clip_vision_model", "projection_dim": 32}
        about |= {"image_token_index": IMAGE_ID, "image_seq_length": 16}
    elif family == "gemma3":
        own |= {"query_pre_attn_scalar": 8, "sliding_window": 64}
        about |= {"mm_tokens_per_image": 4, "image_token_index": IMAGE_ID}
        about |= {
            "boi_token_index": tokenizer.convert_tokens_to_ids("<start_of_image>"),
            "eoi_token_index": tokenizer.convert_tokens_to_ids("<end_of_image>"),
        }
    else:
        own |= {"rope_parameters": rope}
        sizes = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1}
        if family == "qwen2_5_vl":
            sizes = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
            sizes |= {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
        about["vision_config"] = {**sizes, "patch_size": 4, "spatial_merge_size": 2}
        about |= _qwen(tokenizer)
    return CONFIG_MAPPING[family](**about, **ends, tie_word_embeddings=False)


def make_model(family: str, tokenizer: Any, seed: int = 0, **text: Any) -> PreTrainedModel:
    """Return a model in eval mode, with weights from the seed."""
    config = config_of(family, tokenizer, **text)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config).eval()
        with torch.no_grad():  # several families begin with a projection of zeros
            for name, parameter in model.named_parameters():
                if not parameter.any():
                    parameter.copy_(0.3 * torch.randn_like(parameter))
                if "mm_input_projection" in name:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
        model.generation_config.eos_token_id = 1
    return model


def save(family: str, folder: Path, seed: int = 0, size: int = 16, **text: Any) -> str:
    """Write a model with its processor; return the folder."""
    tokenizer = make_tokenizer(family)
    make_model(family, tokenizer, seed, **text).save_pretrained(folder)
    if family in PROCESSORS:
        PROCESSORS[family](tokenizer, size).save_pretrained(folder)
    elif family == "smolvlm":
        tokenizer.save_pretrained(folder)
        SmolVLMImageProcessorPil(
            size={"longest_edge": size}, max_image_size={"longest_edge": 16}
        ).save_pretrained(folder)
        about = {"image_seq_len": 4, "processor_class": "SmolVLMProcessor"}
        (folder / "processor_config.json").write_text(json.dumps(about))
    else:
        tokenizer.save_pretrained(folder)
        Qwen2VLImageProcessorPil(
            patch_size=4,
            merge_size=2,
            min_pixels=64,
            max_pixels=size * size,
        ).save_pretrained(folder)
    return str(folder)


def picture(seed: int, width: int = 12, height: int = 10) -> Image.Image:
    """An image of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    """Return the base64 text of an image's file."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def image_rows(folder: Path, num: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with zero to two images, of different sizes, and short texts."""
    rows = []
    for number in range(num):
        count = (1, 2, 0)[number % 3]
        parts: list[dict[str, str]] = []
        for place in range(count):
            path = folder / f"image_{seed}_{number}_{place}.png"
            picture(100 * seed + 10 * number + place, 8 + number % 9, 12).save(path)
            parts.append({"type": "image", "path": path.name})
        parts.append({"type": "text", "text": "what " + LETTERS[number % 20 :][:3].strip()})
        answer = (LETTERS[(7 * number) % 20 :][: 2 + number % 3]).strip() or "a"
        content = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        rows.append({"messages": content})
    return rows
