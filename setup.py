"""Builds the CPU kernels. They are plain C: the build needs a C compiler and no Python headers.

Without a compiler the install still succeeds, and models run on the slower kernels in torch."""

from glob import glob

from setuptools import Extension, setup

SOURCES = "src/stretto/kernels/cpu/csrc"
FLAGS = [
    "-O3",
    "-std=gnu11",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-pthread",
]

setup(
    ext_modules=[
        Extension(
            "stretto.kernels.cpu._native",
            sources=sorted(glob(f"{SOURCES}/**/*.c", recursive=True)),
            depends=sorted(glob(f"{SOURCES}/**/*.h", recursive=True)),
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            libraries=["m"],
            optional=True,
        )
    ]
)
