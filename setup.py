"""Packages and their data: configs/ lies next to the package and is installed inside it."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["okd_lightning", "okd_lightning.*"]),
        "okd_lightning.configs",
    ],
    package_dir={"okd_lightning.configs": "configs"},
    package_data={
        "okd_lightning": ["py.typed"],
        "okd_lightning.configs": ["**/*.yaml"],
        "okd_lightning.commands": ["*.json"],
        "okd_lightning.commands.quickstart": ["data/*", "teacher/*", "tokenizer/*"],
        "okd_lightning.commands.diagnose": ["*.html"],
    },
)
