"""The study behind docs/okd.md; ``benchmarks/okd.py`` is its command.

* ``arms``: a run: a method on a task under some conditions.
* ``stages``: which runs make a table.
* ``tasks``: models and data; runs an arm and measures it.
* ``pace``: CPU seconds a step, measured side by side; which steps take equally long.
* ``tables``: means over seeds.
"""
