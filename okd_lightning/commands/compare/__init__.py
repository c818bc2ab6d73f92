"""``okd-lightning compare``: methods × seeds on one config under an equal budget.

* ``entries``: what ``--methods`` names, a class or a YAML file.
* ``budget``: how long every run lasts, in steps, tokens or seconds.
* ``folder``: what is on disk, so that a killed comparison continues.
* ``runs``: one run, through the same command line as ``fit``.
* ``command``: the options, the order of the runs, and what is said at the end.
"""
