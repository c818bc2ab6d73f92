"""Parts of ``benchmarks/opd.py``.

* ``arms``: one run, as a line for the command line.
* ``stages``: the runs of each table.
* ``runner``: runs an arm through the command line and reads its measures.
* ``variance``: bias and variance of the sampled gradients against the exact one.
* ``tables``, ``picture``: tables and plot of finished runs.
"""
