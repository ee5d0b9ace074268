"""What pyproject.toml cannot say: the files of configs/ that a wheel carries within the package."""

from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py

LEFT_OUT = ignore_patterns("__pycache__", "mini")  # the mini tasks' data is drawn in a checkout


class BuildPy(build_py):
    """Adds ``configs/methods`` and ``configs/tasks`` as ``llava_todre/configs``."""

    def run(self) -> None:  # noqa: D102
        super().run()
        if not self.editable_mode:  # which finds them in the checkout
            for kind in ("methods", "tasks"):
                target = Path(self.build_lib, "llava_todre", "configs", kind)
                copytree(Path("configs", kind), target, ignore=LEFT_OUT, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildPy})
