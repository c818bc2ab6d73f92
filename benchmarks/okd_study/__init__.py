"""Study for docs/okd.md; ``benchmarks/okd.py`` is its command.

* ``arms``: a run: a method on a task under some conditions.
* ``stages``: the runs of each table.
* ``tasks``: models and data; runs an arm and measures it.
* ``pace``: CPU seconds per step, measured side by side; step counts of equal time.
* ``tables``: means over seeds.
"""
