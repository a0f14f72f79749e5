"""One compiled module; everything else about the package is in pyproject.toml.

FLASHLLM_ABI3=0 builds for the running interpreter only (debugging); FLASHLLM_DEBUG=1 turns on
Cython's bounds checks.  Both are read here and nowhere else.
"""

import os
import sys
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup

ABI3 = os.environ.get("FLASHLLM_ABI3", "1") != "0"
DEBUG = os.environ.get("FLASHLLM_DEBUG", "0") == "1"

# 3.11 is the first limited API with the buffer protocol, which typed memoryviews need.
LIMITED = [("Py_LIMITED_API", "0x030B0000"), ("CYTHON_LIMITED_API", "1")] if ABI3 else []
# -std=c11 rather than gnu11: it also forbids contracting a*b+c into one rounding behind our back.
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unused-function"]
C_ARGS = [] if sys.platform == "win32" else ["-std=c11", "-O3", *WARNINGS]

core = Extension(
    "flashllm._core",
    sources=["ext/_core.pyx", *sorted(glob("ext/*.c"))],
    include_dirs=["ext"],
    depends=sorted(glob("ext/*.h")),
    define_macros=[("_GNU_SOURCE", "1"), ("_FILE_OFFSET_BITS", "64"), *LIMITED],
    extra_compile_args=C_ARGS,
    libraries=[] if sys.platform == "win32" else ["m", "pthread"],
    py_limited_api=ABI3,
)

# The generated C lives under build/, so that ext/ holds only what people wrote.
extensions = cythonize(
    [core],
    build_dir="build",
    compiler_directives={
        "language_level": "3",
        "boundscheck": DEBUG,
        "wraparound": False,
        "initializedcheck": DEBUG,
    },
)

setup(
    ext_modules=extensions,
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ABI3 else {},
)
