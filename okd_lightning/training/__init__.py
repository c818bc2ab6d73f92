"""Parts of a training run: the pair, the step over both models, generation, and saved state.

* ``module``: the DistillationModule; ``distilled_run``: its interface for the parts it is made of.
* Its parts: ``pair``, ``optimization`` (optimizer), ``step`` (loss of a step), ``gradients``
  (checked and clipped), ``evaluation`` (measures), ``frozen_parts`` (hidden from callbacks),
  ``run_state`` (in checkpoints).
* ``pair``: a student and its teacher, which are built, measured and run. ``generation``: by
  one model, or by a mixture of both.
* ``optimizers``, ``optimizer_settings``, ``resumed_rates``: parameter groups, schedules, resume.
* ``loop_state``, ``loaded_ends``, ``arguments``, ``kept_checkpoints``: state in checkpoints.
* ``lightning_privates``: all use of Lightning's private attributes.
* ``run_records``, ``run_settings``, ``opening``, ``lightning_messages``: tables and messages.
* ``rank_agreement``, ``rank_faults``: differing and lost ranks.
* ``config_paths``, ``importable_classes``: paths and classes in configs.
* ``earlier_options``: options of earlier versions, translated to this one's.
* ``safeguards``: callbacks that every run has.
"""
