"""The command line: one sub-command a stage, no logic of its own."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from recllm import __version__
from recllm.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse `arguments` (default: the process's), run the sub-command, return the exit status."""
    parsed = _parse(arguments)
    try:
        parsed.verb(parsed)
    except UserError as error:
        print(f"recllm: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"recllm: the disk is full ({error}); outputs already in place are untouched", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("recllm: stopped; outputs already in place are untouched", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before and after options; argparse takes one run of them only."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(parsed, "overrides") or any(text.startswith("-") or "=" not in text for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides += rest
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="recllm", description="Fine-tune an LLM on what users did.")
    parser.add_argument("--version", action="version", version=f"recllm {__version__}")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = _recipe_verb(
        verbs, "run", _run, "convert → train → evaluate; stages whose inputs have not changed are skipped"
    )
    run.add_argument("--force", action="store_true", help="run every stage, changed or not")
    _engine_of_convert(run)

    convert = _recipe_verb(verbs, "convert", _convert, "interactions → dataset/")
    convert.add_argument("--preview", type=int, metavar="N", help="show N rendered examples a split; write nothing")
    convert.add_argument("--workers", type=int, metavar="N", help="processes; default: the cores, at most 8")
    _engine_of_convert(convert)

    train = _recipe_verb(verbs, "train", _train, "dataset/ → encoder/ and adapter/")
    train.add_argument("--allow-template-mismatch", action="store_true", help="train on a dataset of another template")

    evaluate = _recipe_verb(verbs, "evaluate", _evaluate, "adapter/ → report/")
    engines = ["transformers", "vllm", "ray-vllm"]
    evaluate.add_argument("--engine", choices=engines, help="evaluate.engine: who runs the language models")
    evaluate.add_argument("--replicas", type=int, metavar="N", help="evaluate.replicas: vLLM engines of ray-vllm")

    export = _recipe_verb(verbs, "export", _export, "adapter/ → ordinary LoRAs: of one user, or a few for all users")
    whom = export.add_mutually_exclusive_group(required=True)
    whom.add_argument("--user", metavar="USER_ID", help="fold this user's gate into one LoRA")
    whom.add_argument("--history", metavar="ID,ID,…", help="fold the gate of these items, oldest first, of anybody")
    whom.add_argument("--prototypes", type=int, metavar="M", help="cluster all users' gates into M LoRAs")
    export.add_argument("--output", required=True, metavar="FOLDER", help="where they go")
    export.add_argument(
        "--examples", type=int, default=100, metavar="N", help="held-out examples that measure M's cost (default 100)"
    )

    _serve_verb(verbs)

    compare = verbs.add_parser("compare", help="test the reports of several runs against each other")
    compare.add_argument("reports", nargs="+", metavar="REPORT", help="report/ folders")
    compare.add_argument("--metric", help="only this metric, e.g. hit_rate@1")
    compare.set_defaults(verb=_compare)

    fetch = verbs.add_parser("fetch", help="fetch the offline default: MovieLens-100K, SmolLM2-135M, Wikidata films")
    fetch.set_defaults(verb=_fetch)

    shipped = verbs.add_parser("list", help="list shipped recipes, prompts, protocols and accelerate configs")
    shipped.set_defaults(verb=_list)
    return parser


def _recipe_verb(verbs, name: str, function, text: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    verb.add_argument("recipe", metavar="RECIPE", help="path or shipped name (see `recllm list`)")
    verb.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="e.g. adapter.r=16")
    verb.set_defaults(verb=function)
    return verb


def _engine_of_convert(verb: argparse.ArgumentParser) -> None:
    text = "of convert: this machine, or Ray at RAY_ADDRESS (unset: a Ray of this machine); the files are the same"
    verb.add_argument("--engine", choices=["local", "ray"], default="local", help=text)
    verb.add_argument("--partitions", type=int, metavar="N", help="tasks of Ray that convert is cut into")
    text = "convert leaves out files of the log that cannot be read, and says so in the manifest"
    verb.add_argument("--skip-unreadable", action="store_true", help=text)


def _convert_options(parsed: argparse.Namespace) -> dict[str, object]:
    return {"engine": parsed.engine, "partitions": parsed.partitions, "skip_unreadable": parsed.skip_unreadable}


def _serve_verb(verbs) -> None:
    text = "adapter/ → an OpenAI-compatible vLLM server, each request with its own user's gate"
    serve = verbs.add_parser("serve", help=text, description=text)
    serve.add_argument("adapter", metavar="ADAPTER", help="folder of an instance-wise or a plain LoRA")
    serve.add_argument("--model", metavar="NAME", help="base model; default: the one that the adapter was trained on")
    serve.add_argument("--name", default="recllm", help="of the model in requests (default recllm)")
    types = ["bfloat16", "float16", "float32"]
    serve.add_argument("--dtype", default="bfloat16", choices=types, help="of the base model (default bfloat16)")
    serve.add_argument("--template", metavar="FILE", help="of next_item; default: where the adapter's recipe says")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="0: any free one (default 8000)")
    serve.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key that requests carry")
    serve.add_argument("--api-key-file", metavar="FILE", help="file with that key")
    numbers = {
        "--max-history": (1000, "N", "items of a request's history"),
        "--max-body": (256 << 10, "BYTES", "of a request"),
        "--max-concurrency": (64, "N", "requests in work at once, others get a 503"),
        "--cache-mib": (256, "N", "memory for the gates of users"),
        "--max-model-len": (None, "N", "tokens of a prompt with its answer; default: the model's, at most 4096"),
    }
    for flag, (default, unit, what) in numbers.items():
        what += "" if default is None else f" (default {default})"
        serve.add_argument(flag, type=int, default=default, metavar=unit, help=what)
    serve.add_argument(
        "--drain", type=float, default=25, metavar="S", help="seconds to answer in at a stop (default 25)"
    )
    serve.add_argument("--vllm-log", metavar="FILE", help="of vLLM's output, - is standard error; default: a new file")
    serve.add_argument(
        "--vllm-arg", action="append", default=[], metavar="ARG", help="--vllm-arg=--ARG=VALUE, repeated"
    )
    serve.set_defaults(verb=_serve)


def _load(parsed: argparse.Namespace):
    from recllm.recipe import load_recipe

    return load_recipe(parsed.recipe, parsed.overrides)


def _run(parsed: argparse.Namespace) -> None:
    from recllm import stages

    stages.run(_load(parsed), parsed.force, _convert_options(parsed))


def _convert(parsed: argparse.Namespace) -> None:
    from recllm import stages

    recipe = _load(parsed)
    if parsed.preview is None:
        stages.run_stage(recipe, "convert", force=True, workers=parsed.workers, **_convert_options(parsed))
        return
    from recllm.convert.preview import preview
    from recllm.model.chat import token_counter

    counter = token_counter(recipe.model.name_or_path)
    print(preview(recipe, parsed.preview, counter, stages.graph_tokenizer(recipe)))


def _train(parsed: argparse.Namespace) -> None:
    from recllm import stages

    stages.fine_tune(_load(parsed), parsed.allow_template_mismatch)


def _evaluate(parsed: argparse.Namespace) -> None:
    from recllm import stages

    chosen = {"engine": parsed.engine, "replicas": parsed.replicas}
    parsed.overrides += [f"evaluate.{name}={value}" for name, value in chosen.items() if value is not None]
    stages.run_stage(_load(parsed), "evaluate", force=True)


def _export(parsed: argparse.Namespace) -> None:
    from pathlib import Path

    from recllm import stages

    if parsed.prototypes is not None and parsed.prototypes < 1:
        raise UserError(f"--prototypes {parsed.prototypes}: at least 1 is needed")
    history = None if parsed.history is None else [item for item in parsed.history.split(",") if item]
    stages.export(_load(parsed), Path(parsed.output), parsed.user, parsed.prototypes, max(parsed.examples, 0), history)


def _serve(parsed: argparse.Namespace) -> None:
    from pathlib import Path

    try:
        from recllm.serve.command import Options, read_key, serve
        from recllm.serve.front_door import Limits
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in (
            "fastapi",
            "httpx",
            "prometheus_client",
            "starlette",
            "uvicorn",
        ):
            raise
        raise UserError(f'recllm serve needs {error.name}: run `pip install "recllm[serve]"`') from None

    serve(
        Options(
            adapter=Path(parsed.adapter),
            model=parsed.model,
            name=parsed.name,
            dtype=parsed.dtype,
            template=parsed.template,
            host=parsed.host,
            port=parsed.port,
            api_key=read_key(parsed.api_key_env, parsed.api_key_file),
            limits=Limits(parsed.max_body, parsed.max_history, parsed.max_concurrency),
            cache_mib=parsed.cache_mib,
            max_model_len=parsed.max_model_len,
            drain_s=parsed.drain,
            vllm_log=parsed.vllm_log,
            vllm_args=parsed.vllm_arg,
        )
    )


def _compare(parsed: argparse.Namespace) -> None:
    from pathlib import Path

    from recllm.evaluate.compare import compare

    _say(compare([Path(report) for report in parsed.reports], parsed.metric))


def _fetch(_: argparse.Namespace) -> None:
    from recllm.data import offline

    offline.fetch_all()


def _list(_: argparse.Namespace) -> None:
    from recllm import assets

    _say("\n".join("\n  ".join([f"{kind}:", *assets.names(kind)]) for kind in assets.KINDS))


def _say(text: str) -> None:
    """Print what a verb was asked for; whoever reads it may stop reading: `recllm list | head`."""
    try:
        print(text, flush=True)  # not when the interpreter ends, where nobody catches
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to flush
        raise SystemExit(1) from None


if __name__ == "__main__":
    sys.exit(main())
