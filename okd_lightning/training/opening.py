"""Messages and checks at the start of training: trained parameters and the teacher's place."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from okd_lightning.losses import Term
from okd_lightning.training.cache_preparation import prepare_cache
from okd_lightning.training.pair_module import PairModule


def open_run(module: PairModule, terms: Sequence[Term], learning_rate: float) -> None:
    """Report what is trained, warn of updates lost to rounding, and open the cache.

    Args:
        module: A module inside a Trainer, with its models on their devices.
        terms: The run's terms.
        learning_rate: The student's learning rate.

    Raises:
        OKDLightningError: See ``prepare_cache``.
    """
    for name, model in (("student", module.student), ("teacher", module.teacher)):
        if model is not None:
            sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
            total, trained = sum(n for n, _ in sizes), sum(n for n, t in sizes if t)
            rank_zero_info(f"{name}: {total:,} parameters, {trained:,} trained")
    rank_zero_info(module.ends.described(module.tokenizer))
    if module.dtype_name == "bfloat16" and module.student_adapter is None:
        rank_zero_warn(
            "the student's own weights are bfloat16, which keeps 8 bits of each: steps of a "
            f"small learning rate (here {learning_rate:g}) mostly round to nothing; give "
            "--model.dtype float32 with --trainer.precision bf16-mixed, or a student_adapter"
        )
    if module.self_teacher is not None:
        rank_zero_info(f"the student is its own teacher ({module.self_teacher})")
    if module.served_teacher is not None:
        module.served_teacher.connect()
    elif module.cache_in_use is not None:
        prepare_cache(  # packing is known once the teacher is loaded, so ``sides`` is read late
            module, module.trainer, terms, lambda model, read: module.sides.side(model, read)
        )
