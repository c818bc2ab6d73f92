"""A toy of images: coloured shapes, drawn here, to words. Does a student learn from its teacher?

    python benchmarks/images.py --seeds 0 1 2

A LLaVA of 0.1 million parameters is trained on 640 drawings with their names, and is the teacher. A
smaller one is the student. It begins with SFT on few drawings, of which every second has another
drawing's name, and continues from there for the same number of steps with SFT, KD or GKD on the
same rows. Reported is the share of new drawings that are named right. A last contender is KD with
the student's vision tower set to zero, which sees nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor

from okd_lightning.callbacks import GKD, KD, SFT
from okd_lightning.data import RolloutDataModule
from okd_lightning.engines import Sampling
from okd_lightning.training.module import DistillationModule

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230)}
SHAPES = ("disc", "box", "bar", "ring")
SPECIAL = ("<pad>", "<eos>", "<bos>", "<image>")
SIZE = 16


def drawing(name: str, generator: torch.Generator) -> Image.Image:
    """Draw a shape at a random place, on a background of random pixels."""
    colour, shape = name.split()
    noise = torch.randint(0, 90, (SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    pen, ink = ImageDraw.Draw(image), COLOURS[colour]
    x, y = (int(torch.randint(0, 7, (), generator=generator)) for _ in range(2))
    box = (x, y, x + 8, y + 8)
    if shape == "disc":
        pen.ellipse(box, fill=ink)
    elif shape == "ring":
        pen.ellipse(box, outline=ink, width=2)
    elif shape == "box":
        pen.rectangle(box, fill=ink)
    else:
        pen.rectangle((x, y + 3, x + 8, y + 5), fill=ink)
    return image


def rows(num: int, seed: int, share_wrong: float = 0.0) -> list[dict[str, Any]]:
    """Return prompts with drawings and names, a share of which is another drawing's."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    found = []
    for _ in range(num):
        own, other = (names[int(torch.randint(12, (), generator=generator))] for _ in range(2))
        is_wrong = float(torch.rand((), generator=generator)) < share_wrong
        found.append(
            {
                "prompt": "<image>",
                "response": other if is_wrong else own,
                "images": [drawing(own, generator)],
            }
        )
    return found


def tokenizer() -> PreTrainedTokenizerFast:
    """One id a letter."""
    letters = sorted({*"".join([*COLOURS, *SHAPES]), " "})
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    own.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    own.decoder = decoders.Fuse()
    own.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=own,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )


def save(folder: Path, width: int, seed: int) -> str:
    """Write a random LLaVA with its processor; return the folder."""
    own = tokenizer()
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4}
    text = {
        "model_type": "llama",
        "vocab_size": len(own),
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "initializer_range": 0.1,
    }
    vision = {
        "model_type": "clip_vision_model",
        "num_hidden_layers": 2,
        "image_size": SIZE,
        "patch_size": 4,
        "projection_dim": width,
        "initializer_range": 0.1,
        "initializer_factor": 3.0,
    }
    config = LlavaConfig(
        text_config={**text, **sizes},
        vision_config={**vision, **sizes},
        image_token_index=3,
        image_seq_length=SIZE,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        eos_token_id=1,
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    settings = {"patch_size": 4, "num_additional_image_tokens": 1}
    processor = LlavaProcessor(images, own, vision_feature_select_strategy="default", **settings)
    processor.save_pretrained(folder)
    return str(folder)


def train(
    folder: Path,
    student: str,
    teacher: str | None,
    method: Any,
    data: Any,
    steps: int,
    seed: int,
    freezes: bool = False,
) -> DistillationModule:
    """Return the module after training."""
    lightning.seed_everything(seed, verbose=False)
    module = DistillationModule(
        student, teacher, learning_rate=3e-3, warmup_steps=10, freeze_vision=freezes
    )
    trainer = lightning.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[method],
    )
    limits = {"max_prompt_length": 40, "max_response_length": 12, "val_rollouts": 0}
    trainer.fit(module, RolloutDataModule(data, batch_size=32, seed=seed, **limits))
    return module


def accuracy(folder: Path, module: DistillationModule, data: list[dict[str, Any]]) -> float:
    """Return the share of drawings whose greedy answer is their name."""
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder
    )
    limits = {"max_prompt_length": 40, "max_response_length": 12}
    greedy = Sampling(temperature=0)
    loaders = RolloutDataModule(predict=data, batch_size=64, sampling=greedy, **limits)
    batches = trainer.predict(module, loaders) or []
    records = [record for batch in batches for record in batch]
    right = [record["response"] == data[record["index"]]["response"] for record in records]
    return sum(right) / len(data)


def written(module: DistillationModule, folder: Path) -> str:
    """Write the student with its processor; return the folder."""
    assert module.student is not None
    module.student.save_pretrained(folder)
    module.tokenizer.save_pretrained(folder)
    reader = module.pair.images.student
    assert reader is not None
    reader.save(folder)
    return str(folder)


CONTENDERS: dict[str, Callable[[], Any]] = {
    "SFT": SFT,
    "KD": KD,
    "GKD": lambda: GKD(0.5, on_policy_fraction=0.5),
}


def study(root: Path, seeds: list[int], teacher_steps: int, steps: int, num: int) -> dict[str, Any]:
    """Return the teacher's and every contender's share of right names, by seed."""
    held = rows(240, 999)
    begun = save(root / "teacher0", 64, 0)
    taught = train(root, begun, None, SFT(), rows(640, 1), teacher_steps, 0)
    teacher = written(taught, root / "teacher")
    result: dict[str, Any] = {"teacher": accuracy(root, taught, held)}
    found: dict[str, list[float]] = {}
    for seed in seeds:
        data = rows(num, 100 + seed, share_wrong=0.5)
        fresh = save(root / f"fresh{seed}", 32, 10 + seed)
        first = train(root, fresh, None, SFT(), data, steps, seed)
        start = written(first, root / f"start{seed}")
        found.setdefault("start", []).append(accuracy(root, first, held))
        for name, method in CONTENDERS.items():
            own = train(root, start, teacher, method(), data, steps, seed)
            found.setdefault(name, []).append(accuracy(root, own, held))
        unseeing = blind(start, root / f"blind{seed}")
        own = train(root, unseeing, teacher, KD(), data, steps, seed, freezes=True)
        found.setdefault("KD, blind", []).append(accuracy(root, own, held))
    return {**result, **found}


def blind(start: str, folder: Path) -> str:
    """Write a student whose vision tower is zero; return the folder."""
    module = DistillationModule(start)
    module.configure_model()
    assert module.student is not None
    with torch.no_grad():
        for parameter in module.student.model.vision_tower.parameters():
            parameter.zero_()
    return written(module, folder)


def main() -> None:
    """Print the shares as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--teacher_steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rows", type=int, default=160)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        found = study(Path(folder), given.seeds, given.teacher_steps, given.steps, given.rows)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
