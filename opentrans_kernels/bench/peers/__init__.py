"""Other engines on the same masked trunk, each in an environment and a process of its own.

``registry`` knows them and their pinned versions, ``environments`` makes their environments,
``graph`` writes the network in a form that needs no exporter, ``process`` talks to a worker and
``session`` lets all of them take turns with ours. A peer that is absent is skipped with the reason;
one that fails or dies is recorded, and the others go on.
"""
