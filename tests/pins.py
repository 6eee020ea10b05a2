"""Versions as pip reads them, from the bounds in settings.ini and from what is installed.

    python tests/pins.py oldest     the lower bound of every requirement but torch: `make test`
    python tests/pins.py newest     every direct requirement as it is here: constraints.txt

Standard library only.
"""

import re
import sys
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch", "torchvision"  # 5 GB: too much for a second copy
WITH_OLDEST = "huggingface-hub>=1.5,<2", "pytz", "pydantic-core==2.33.0"  # what these then want


def requirements(*keys):
    "{name: bounds} of what settings.ini requires."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    words = " ".join(settings["DEFAULT"][key] for key in keys).split()
    return dict(re.fullmatch(r"([\w-]+)(.*)", word).groups() for word in words)


def oldest():
    "{name: lower bound} of what users need, but torch."
    found = {name: re.search(r">=([\d.]+)", b) for name, b in requirements("requirements").items()}
    return {name: least[1] for name, least in found.items() if name not in TORCH}


def newest():
    "{name: installed version} of what users and developers need; local builds as their release."
    names = requirements("requirements", "dev_requirements")
    return {name: version(name).partition("+")[0] for name in names}


if __name__ == "__main__":
    pins = dict(oldest=oldest, newest=newest)[sys.argv[1]]()
    lines = [f"{name}=={pins[name]}" for name in sorted(pins)]
    print(*lines, *(WITH_OLDEST if sys.argv[1] == "oldest" else ()), sep="\n")
