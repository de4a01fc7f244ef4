"""Fair timing on a CPU: interleaved rounds, every dense variant, and the machine beside the number.

``timing`` measures any named callables, ``canary`` tells a disturbed machine, ``cores`` tells two
physical cores from one shared core, ``environment`` and ``machines`` say where a number comes from.
``variants`` builds the dense competitors of a trunk, ``peers`` runs other engines. ``cases`` are
shapes; ``ops``, ``layers``, ``trunk`` and ``model`` measure them. ``schema`` is what a result file
must hold, ``compare`` and ``derive`` read results. Nothing here is imported by the kernels.
"""
