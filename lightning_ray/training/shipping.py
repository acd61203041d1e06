"""The user's own code on its way to other processes and nodes.

Invariant: a class of the user's own, and what it uses of modules beside it, travels inside the Ray
call that needs it. So it works on nodes that have none of the user's files, and nothing but code is
copied. What is installed is imported where it is used: it has to be installed on every node, as
this package has.
"""

import os
import sys
import sysconfig
from pathlib import Path

from ray import cloudpickle

_INSTALLED = tuple(
    {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
)
_OURS = Path(__file__).resolve().parents[1]


def ship_by_value(thing: object) -> list[str]:
    """Have Ray send the code of `thing`'s module, and of the modules beside it, with each call.

    A module lies beside it if it was imported from the same folder or from below it, and is
    neither installed nor part of this package. Returns their names; none for an installed `thing`.
    """
    module = sys.modules[type(thing).__module__]
    file = _file(module)
    if file is None or _is_installed(file):
        return []
    top = sys.modules[module.__name__.partition(".")[0]]
    top_file = _file(top) or file
    # Of a package the folder that holds the package.
    root = top_file.parent.parent if top_file.name == "__init__.py" else top_file.parent
    shipped = []
    for name, other in list(sys.modules.items()):
        place = _file(other)
        if place is None or not place.is_relative_to(root) or _is_installed(place):
            continue
        # Under its own name, and Python: compiled code cannot travel.
        if other.__name__ == name and name != "__main__" and place.suffix == ".py":
            cloudpickle.register_pickle_by_value(other)
            shipped.append(name)
    return shipped


def _file(module: object) -> Path | None:
    file = getattr(module, "__file__", None)
    # Some libraries make modules whose file is a bare name.
    return Path(file).resolve() if isinstance(file, str) and os.path.isabs(file) else None


def _is_installed(file: Path) -> bool:
    return any(file.is_relative_to(folder) for folder in (*_INSTALLED, _OURS))
