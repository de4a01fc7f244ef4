"""The spectrum on an NVIDIA GPU: Gram matrices, eigenvalues and fit without leaving the device.

    gram -> solve (cusolver | tridiagonal, sturm) -> spectra -> estimate -> powerlaw_fit (triton)

Imported when ``estimate_alpha(..., device="cuda")`` needs it; triton only for its kernels.
"""

from .estimate import DeviceSpectrum, eigenvalues
from .solve import SOLVERS

__all__ = ["SOLVERS", "DeviceSpectrum", "eigenvalues"]
