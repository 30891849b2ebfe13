"""Build step: a wheel carries the calibration text as one compressed archive instead of a folder of documents."""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))  # isolated builds do not have the checkout on the path


class PackText(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # reads the folder of the checkout
        from exl2ray.calibration.text import ARCHIVE, pack_text  # needs nothing outside the standard library

        built = Path(self.build_lib) / "exl2ray" / "calibration"
        pack_text(built / ARCHIVE, Path(__file__).parent / "exl2ray" / "calibration" / "text")
        shutil.rmtree(built / "text", ignore_errors=True)


setup(cmdclass={"build_py": PackText})
