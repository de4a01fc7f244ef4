"""The training layer of OpenTrans, above the kernels.

Importing this package imports neither torch nor the kernels.
"""
