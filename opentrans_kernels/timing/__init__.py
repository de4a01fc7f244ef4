"""What every measurement here rests on: pairs of times from one round, and a look at the machine.

``spread`` summarises samples and picks the round that stands for a comparison, ``canary`` tells a
disturbed machine, ``rounds`` compares two calls and measures disturbed rounds again.
"""
