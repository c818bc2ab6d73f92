"""``okd-lightning diagnose``: measurements of a pair and its prompts before a long run.

* ``findings``: the records of a diagnosis; ``diagnosis.json`` is made of them.
* ``text_checks``: tokenizer, template, lengths. ``ends``: the ids with which both models end.
* ``responses``: the measured rows: dataset responses, and responses of student and teacher.
* ``positions``: divergences, entropies and top-k mass, by position in the response.
* ``gradients``: bias and noise of each sampled estimator against the exact gradient.
* ``steps``: the change of the student in a few simulated steps, and the cost of a step.
* ``rules``: the recommended methods, and the numbers that support them.
* ``examination``: all of it, inside a Trainer; ``command``: the options and the output.
* ``figures``, ``page``, ``terminal``: the findings as plots, as HTML and in the terminal.
"""
