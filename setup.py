"""The codec's optional C part; everything else about the package stands in setup.cfg."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "imaging.sendstream.native",
            ["imaging/sendstream/native.c"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],  # one build for every Python from 3.11 on
            py_limited_api=True,
            extra_compile_args=["-O3"],
            optional=True,  # no compiler or no headers: numpy does the same, more slowly
        )
    ]
)
