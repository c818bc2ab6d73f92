"""Parts of a training run: the pair, the step over both models, generation, and saved state.

* ``module``: the DistillationModule, on ``optimized_module`` (optimizer), ``measured_module``
  (validation), ``pair_module`` (building), ``pair_runs`` (running) and ``frozen_parts``.
* ``pair_sides``, ``mixture_engine``: both models as inputs of the loss layer, and as generators.
* ``step_terms``, ``step_metrics``: terms and logged metrics of an optimizer step.
* ``optimizers``, ``optimizer_settings``, ``resumed_rates``: parameter groups, schedules, resume.
* ``run_state``, ``loop_state``, ``arguments``, ``kept_checkpoints``: state in checkpoints.
* ``lightning_privates``: all use of Lightning's private attributes.
* ``run_records``, ``run_settings``, ``opening``, ``lightning_messages``: tables and messages.
* ``rank_agreement``, ``rank_faults``: differing and lost ranks.
* ``config_paths``, ``importable_classes``: paths and classes in configs.
* ``cache_preparation``: the teacher's cache at the start of a run.
* ``safeguards``: callbacks that every run has.
"""
