"""What pyproject.toml cannot say: rooms that are found by themselves, and conf/ from beside the package.

The checkout keeps conf/ at its top, where a user reads it; a wheel carries it as llm_recipes/conf.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["llm_recipes", "llm_recipes.*"]),
        "llm_recipes.conf",
        "hydra_plugins.llm_recipes_launcher",
    ],
    package_dir={"llm_recipes.conf": "conf"},
    package_data={
        "llm_recipes.conf": ["**/*.yaml", "template/*.jinja"],
        "llm_recipes.evaluation.definitions": ["*/*.yaml", "*/*.jsonl"],
        "llm_recipes.reporting": ["page.css", "page.js"],
    },
)
