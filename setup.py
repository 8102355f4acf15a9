"""The packages of a wheel: conf/ stands at the top of a checkout and inside an installed
package.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["sae_experiments*"]),
        "sae_experiments.conf",
        "sae_experiments.templates",
    ],
    package_dir={"sae_experiments.conf": "conf", "sae_experiments.templates": "templates"},
    package_data={
        "sae_experiments": ["py.typed"],
        "sae_experiments.conf": ["*.yaml", "*/*.yaml", "*/*/*.yaml"],
        "sae_experiments.templates": ["*/*", "*/*/*"],
        "sae_experiments.report": ["*.js", "*.css", "*.html"],
        "sae_experiments.results": ["*.json"],
        "sae_experiments.studies.superposition": ["*.c"],
    },
)
