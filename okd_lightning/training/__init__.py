"""Parts of a training run: the pair, the step over both models, generation, and saved state.

* ``module``: the DistillationModule, on ``optimized_module`` (optimizer), ``measured_module``
  (validation), ``paired_module`` (building) and ``frozen_parts``.
* ``pair``: a student and its teacher, which are built, measured and run. ``mixture_engine``: both
  as one engine.
* ``step_terms``, ``step_metrics``: terms and logged metrics of an optimizer step.
* ``optimizers``, ``optimizer_settings``, ``resumed_rates``: parameter groups, schedules, resume.
* ``run_state``, ``loop_state``, ``arguments``, ``kept_checkpoints``: state in checkpoints.
* ``lightning_privates``: all use of Lightning's private attributes.
* ``run_records``, ``run_settings``, ``opening``, ``lightning_messages``: tables and messages.
* ``rank_agreement``, ``rank_faults``: differing and lost ranks.
* ``config_paths``, ``importable_classes``: paths and classes in configs.
* ``earlier_options``: options of earlier versions, in the words of this one.
* ``safeguards``: callbacks that every run has.
"""
