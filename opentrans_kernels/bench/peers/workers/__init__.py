"""Scripts that run in a peer's own environment, each timing one engine on command.

Only ``ours``, ``ours_worker``, ``our_operator_worker`` and ``torch_pruning_worker`` may import this
package; the others see the standard library, NumPy and their engine.
"""
