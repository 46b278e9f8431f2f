"""One sequence on several ranks: Ulysses' all-to-all inside, a ring with log-sum-exp merging across.

A group of N = u r ranks shares a micro-batch's row of tokens. Everything in a model but attention looks at one token at
a time, so each rank computes with its own; attention (`attention.py`) is the one place where they meet, and
transformers calls it through its attention interface, whatever the model. `degrees.py` chooses u and r, `row.py` says
who holds which tokens, `group.py` gives every rank the log-probabilities of the whole row.
"""
