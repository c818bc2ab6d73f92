"""Commands of the ``okd-lightning`` program.

* ``cli``: ``fit``, ``validate``, ``test`` and ``predict``, on LightningCLI; ``cli_arguments``,
  ``cli_callbacks``, ``cli_errors`` (on ``complaints``), ``cli_runs`` are its parts.
* ``compare``, ``diagnose``, ``quickstart``, ``export_command`` with ``export``: the other commands.
* ``given_options``, ``settled_options``, ``resume_rules``, ``foreign_options``: the options that
  the user gave.
* ``saved_config``, ``config_trust``: a checkpoint's own config, and the classes and servers that it
  may name.
* ``run_folder``, ``default_folder``: a run's files, and their folder.
* ``reports``: tables, plots and results of several runs.
* ``lm_eval_adapter``: a student as a model of lm-evaluation-harness.
"""
