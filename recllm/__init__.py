"""recllm: fine-tune an LLM on what users did, so that one adapter adapts itself to each user.

`recllm.load_adapter(base_model, folder)` gives the adapter of a folder on its base model (recllm/model/adapter.py).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recllm.model.adapter import load_adapter

__version__ = "0.1.0"
__all__ = ["__version__", "load_adapter"]


def __getattr__(name: str) -> Any:
    """load_adapter, imported when it is first asked for: `import recllm` loads neither torch nor PEFT."""
    if name != "load_adapter":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from recllm.model.adapter import load_adapter

    return load_adapter


def __dir__() -> list[str]:
    return __all__
