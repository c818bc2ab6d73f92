"""The parts of ``benchmarks/opd.py``.

* ``arms``: one run, as a line for the command line.
* ``stages``: which runs make a table.
* ``runner``: runs an arm through the command line and reads what it measured.
* ``variance``: bias and variance of the sampled gradients against the exact one.
* ``tables``, ``picture``: what is shown of finished runs.
"""
