"""The training layer of OpenTrans, above the kernels; ``python -m opentrans.demo`` runs the demo.

Importing this package imports neither torch nor the kernels.
"""
