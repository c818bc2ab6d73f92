"""The files of tests that take longest, longest first, by what a whole run has shown.

They start first, so that no worker is left with one of them at the end; ``--no-loadscope-reorder``
lets the workers take files in this order.
"""

from __future__ import annotations

from pathlib import Path

LONGEST = (
    *("cli/test_preemption.py", "test_fsdp2.py", "cli/test_checkpoints.py", "cli/test_compare.py"),
    *("test_packaged_configs.py", "cli/test_diagnose.py", "test_fsdp2_checkpoints.py"),
    *("test_resume.py", "cli/test_fit.py", "callbacks/test_health_warnings.py", "test_ddp.py"),
    *("cli/test_wheel.py", "cli/test_self_teaching.py", "cli/test_tools_from_files.py"),
    *("test_real_pairs.py", "callbacks/test_okd_training.py", "test_ddp_faults.py"),
    *("test_soak.py", "teacher_cache/test_served_teacher.py", "docs/test_pages.py"),
    *("cli/test_evaluation_doc.py", "cli/test_mistakes.py", "golden/test_golden.py"),
    *("cli/test_configs.py", "cli/test_foreign_checkpoints.py", "cli/test_damaged_folders.py"),
)

_PLACES = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}


def place_of(path: Path) -> int:
    """Where a file of tests stands; all that are not listed share the last place."""
    return _PLACES.get(path, len(LONGEST))
