"""The embedded task: needs no network, and its answers can be checked.

* ``task``: problems, their exact check, and the JSONL files in ``data/``.
* ``tokenizer``: one id per character; the committed folder ``tokenizer/``.
* ``recipe``: sizes of the student and lengths of the stages.
* ``run``: warm start, and the compared runs; ``command``: the options.
"""
