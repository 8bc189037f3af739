"""Finds shipped recipes, prompts, protocols and accelerate configs, in a checkout or in an installed wheel.

A kind and a name enter ("recipes", "movielens/next_item_ilora"); the path of a readable file leaves.
"""

import difflib
from pathlib import Path

from recllm.errors import UserError

KINDS = ("recipes", "prompts", "eval", "accelerate_configs")
_PACKAGE = Path(__file__).resolve().parent


def folder(kind: str) -> Path:
    """The folder of one kind of asset: recllm/shipped/KIND of a wheel, KIND at the top of a checkout."""
    shipped = _PACKAGE / "shipped" / kind
    return shipped if shipped.is_dir() else _PACKAGE.parent / kind


def names(kind: str) -> list[str]:
    """Names of the shipped assets of one kind, without their ending.

    >>> "movielens/next_item_ilora" in names("recipes")
    True
    """
    root = folder(kind)
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def find(kind: str, name: str | Path) -> Path:
    """Path of an asset: a file of the user's if one exists under that path, otherwise the shipped one of that name."""
    given = Path(name)
    if given.is_file():
        return given
    shipped = folder(kind) / given
    for candidate in (shipped, Path(f"{shipped}.yaml")):
        if candidate.is_file():
            return candidate
    close = difflib.get_close_matches(str(name).removesuffix(".yaml"), names(kind), n=1, cutoff=0.4)
    hint = f'did you mean "{close[0]}"?' if close else f"shipped: {', '.join(names(kind))}"
    raise UserError(f'no file and no shipped {kind} entry is called "{name}": {hint}')
