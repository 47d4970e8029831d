"""Which folder becomes which package. Everything else about the project is in pyproject.toml.

The repository root *is* the package ``conceptmaster``, so that no top-level ``engine`` or ``runtime`` reaches
site-packages. The packages are listed by hand because finding them would take ``tests`` along;
``tests/test_house.py`` holds this list to the folders that exist.
"""

from __future__ import annotations

from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGES = [
    "conceptmaster",
    "conceptmaster.benchmarks",
    "conceptmaster.benchmarks.gpu",
    "conceptmaster.benchmarks.gpu.cases",
    "conceptmaster.benchmarks.gpu.questions",
    "conceptmaster.benchmarks.gpu.whole",
    "conceptmaster.benchmarks.mc_bench",
    "conceptmaster.engine",
    "conceptmaster.engine.checkpoints",
    "conceptmaster.engine.vae",
    "conceptmaster.examples",
    "conceptmaster.examples.data",
    "conceptmaster.examples.sprites",
    "conceptmaster.examples.sprites.mc_bench",
    "conceptmaster.examples.sprites.paper",
    "conceptmaster.examples.sprites.scoring",
    "conceptmaster.examples.sprites.training",
    "conceptmaster.examples.sprites.world",
    "conceptmaster.examples.stickers",
    "conceptmaster.examples.stickers.scoring",
    "conceptmaster.examples.stickers.training",
    "conceptmaster.examples.stickers.world",
    "conceptmaster.export",
    "conceptmaster.export.onnx_graphs",
    "conceptmaster.export.tensorrt_engines",
    "conceptmaster.export.triton_server",
    "conceptmaster.kernels",  # no __init__.py, on purpose: see CONTRIBUTING.md
    "conceptmaster.runtime",
    "conceptmaster.runtime.backends",
    "conceptmaster.runtime.backends.pytorch",
    "conceptmaster.runtime.bundle_format",
    "conceptmaster.runtime.server",
    "conceptmaster.runtime.workers",
]

PACKAGE_DATA = {
    "conceptmaster": ["py.typed"],
    # The sprites' bundles stay in the repository: a wheel carries the default alone.
    "conceptmaster.runtime": ["bundles/stickers/*.json", "bundles/stickers/*.onnx"],
    "conceptmaster.runtime.server": ["page/*"],
    "conceptmaster.examples.data": ["taxonomy.txt"],
    "conceptmaster.examples.sprites": ["baseline.json", "requests/**/*.json", "requests/**/*.png"],
    "conceptmaster.examples.stickers": ["CREDITS.md", "requests/**/*.json", "requests/**/*.png"],
}


class BuildPackage(build_py):
    """``build_py`` that leaves this file out: lying in the root, it would count as one of its modules."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """The modules of ``package`` as (package, module, file), without ``setup``."""
        modules = super().find_package_modules(package, package_dir)
        return [found for found in modules if (found[0], found[1]) != ("conceptmaster", "setup")]


setup(
    packages=PACKAGES,
    package_dir={"conceptmaster": "."},
    package_data=PACKAGE_DATA,
    include_package_data=False,
    cmdclass={"build_py": BuildPackage},
)
