"""The one compiled part: the JPEG region decoder. All else stands in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "loaders._jpeg",
            ["loaders/_jpeg.c"],
            depends=["loaders/_resample.h"],
            libraries=["jpeg"],
            extra_compile_args=["-O3"],
            optional=True,  # without a compiler or libjpeg-turbo's headers Pillow decodes
        )
    ]
)
