"""Prints what the package and some extras require, for `pip install -r`: dependencies become a layer of their own.

`python requirements.py gateway`, beside pyproject.toml. It runs in a build, where nothing is installed yet.
"""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # before Python 3.11, where only tests run this
    import tomli as tomllib

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = [project["optional-dependencies"][extra] for extra in sys.argv[1:]]
for requirement in sum(extras, project["dependencies"]):
    if not re.match(r"tidewright[-\[]", requirement):  # ours: tidewright-client needs nothing that we do not
        print(requirement)
