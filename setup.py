"""What setuptools cannot read from pyproject.toml: where the packages lie.

The Triton kernels stand on a floor of their own, `kernels/`, and are installed as `clone_fast.kernels`. That
package is listed by hand: it has no `__init__.py` (see kernels/README.md), so `find_packages` passes it over.

The CUDA floor is built from here too, once csrc/ holds sources: nvcc through ninja, no torch header, no torch
import, no download (see csrc/README.md). Until then the distribution is pure Python.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["clone_fast", "clone_fast.*"]), "clone_fast.kernels"],
    package_dir={"clone_fast.kernels": "kernels"},
    package_data={
        "clone_fast": ["py.typed"],
        "clone_fast.demo": ["*.safetensors"],
        "clone_fast.kernels": ["README.md"],
    },
)
