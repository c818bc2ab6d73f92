"""The files of tests that take longest, longest first, by what a whole run has shown.

They start first, so that no worker is left with one of them at the end; ``--no-loadscope-reorder``
lets the workers take files in this order.
"""

from __future__ import annotations

from pathlib import Path

LONGEST = (
    *("sharding/test_fsdp2.py", "commands/test_packaged_configs.py"),
    *("commands/test_preemption.py", "commands/compare/test_compare.py"),
    *("sharding/test_fsdp2_checkpoints.py", "commands/test_checkpoints.py"),
    *("commands/diagnose/test_diagnose.py", "training/test_resume.py"),
    *("docs/test_pages.py", "commands/test_tools_from_files.py"),
    *("test_soak.py", "commands/test_wheel.py"),
    *("training/test_ddp.py", "commands/test_fit.py"),
    *("engines/test_tool_rollouts.py", "training/safeguards/test_health_warnings.py"),
    *("training/test_ddp_faults.py", "commands/test_real_pairs.py"),
    *("teachers/test_served_teacher.py", "commands/test_self_teaching.py"),
    *("commands/test_evaluation_doc.py", "callbacks/methods/test_okd_training.py"),
    *("commands/test_mistakes.py", "advantages/test_f_divergence.py"),
    *("commands/test_shelf_fit.py", "commands/test_export.py"),
    *("teachers/test_cached_runs.py", "teachers/test_self_teacher.py"),
    *("commands/quickstart/test_run.py", "commands/test_teacher_server.py"),
    *("commands/test_foreign_checkpoints.py", "commands/test_damaged_folders.py"),
    *("commands/test_configs.py", "golden/test_golden.py"),
)

_PLACES = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}


def place_of(path: Path) -> int:
    """Return the place of a test file in the list; unlisted files share the last place."""
    return _PLACES.get(path, len(LONGEST))
