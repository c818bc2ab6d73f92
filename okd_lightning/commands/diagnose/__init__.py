"""``okd-lightning diagnose``: a pair and its prompts looked at before a long run is paid for.

* ``findings``: the records of what was found; ``diagnosis.json`` is made of them.
* ``text_checks``: tokenizer, template, eos, lengths.
* ``responses``: given, the student's own and the teacher's rows that everything is measured on.
* ``positions``: divergences, entropies and top-k mass, by place in the response.
* ``gradients``: bias and noise of each sampled estimator against the exact gradient.
* ``steps``: how far a few simulated steps move the student, and what a step costs.
* ``rules``: which method to try, and because of which numbers.
* ``examination``: all of it, inside a Trainer; ``command``: the options and what is said.
* ``figures``, ``page``, ``terminal``: the same findings as pictures, as HTML and in the terminal.
"""
