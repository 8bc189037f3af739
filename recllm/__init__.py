"""recllm: fine-tune an LLM on what users did, so that one adapter adapts itself to each user."""

__version__ = "0.1.0"
