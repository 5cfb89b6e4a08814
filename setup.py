"""Builds the CPU kernels, plain C that needs a compiler and nothing else. Without one the install still
succeeds, and the kernels written in torch are used."""

from glob import glob

from setuptools import Extension, setup

HERE = "src/stretto/kernels/cpu"
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
            sources=sorted(glob(f"{HERE}/*.c")),
            depends=sorted(glob(f"{HERE}/*.h")),
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            libraries=["m"],
            optional=True,
        )
    ]
)
