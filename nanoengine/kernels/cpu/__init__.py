"""Kernels in C for CPUs, built at first use by the system's compiler; plain torch where they cannot be."""

from nanoengine.kernels.cpu.build import Built, NotBuilt, built
from nanoengine.kernels.cpu.library import KINDS, Library, load

__all__ = ["KINDS", "Built", "Library", "NotBuilt", "built", "load"]
