"""Fair timing on a CPU: interleaved rounds, every dense variant, and the machine beside the number.

``timing`` measures any named callables, ``cores`` tells two physical cores from one shared core,
``variants`` builds the dense competitors of a trunk, ``layers`` times layers one by one, ``trunk``
puts them together for ``opentrans bench trunk``. Nothing here is imported by the kernels.
"""
