"""The doctor: what may be wrong with machines, looked at on all of them in parallel before weights load.

A check is a file in `checks/`: what a node is asked, and what its answers mean. `examine.py` runs checks on a team of
nodes (`team.py`: through Ray, or this machine alone), `wanted.py` says what a job needs of them, `verb.py` is
`swift-dist doctor`, `preflight.py` the short form with which every job of several nodes begins.
"""
