"""``okd-lightning compare``: methods × seeds on one config under an equal budget.

* ``entries``: the classes and YAML files of ``--methods``.
* ``budget``: the length of every run, in steps, tokens, seconds or CPU seconds.
* ``folder``: the files on disk, from which a killed comparison continues.
* ``runs``: one run, through the same command line as ``fit``.
* ``command``: the options, the order of the runs, and the final report.
"""
