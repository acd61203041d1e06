"""YAML in which a text stays a text, whoever reads it.

PyYAML leaves `1e5` without quotes, for it is no number in YAML 1.1; readers of YAML 1.2, such as
Kubernetes, and OmegaConf's take it for one.
"""

import re

import yaml


class PlainDumper(yaml.SafeDumper):
    """Quotes every text that some reader takes for a number."""


PlainDumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)
# As the reader of Kubernetes has them: more kinds of numbers, and letters that are yes and no.
PlainDumper.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?0([oO][0-7_]+|[xX][0-9a-fA-F_]+|[bB][01_]+)$"),
    list("-+0"),
)
PlainDumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^[yYnN]$"), list("yYnN"))
