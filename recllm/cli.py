"""The command line: one sub-command a stage, no logic of its own."""

import argparse
import errno
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

    convert = _recipe_verb(verbs, "convert", _convert, "interactions → dataset/")
    convert.add_argument("--preview", type=int, metavar="N", help="show N rendered examples a split; write nothing")
    convert.add_argument("--workers", type=int, metavar="N", help="processes; default: the cores, at most 8")

    train = _recipe_verb(verbs, "train", _train, "dataset/ → encoder/ and adapter/")
    train.add_argument("--allow-template-mismatch", action="store_true", help="train on a dataset of another template")

    _recipe_verb(verbs, "evaluate", _evaluate, "adapter/ → report/")

    export = _recipe_verb(verbs, "export", _export, "adapter/ → ordinary LoRAs: of one user, or a few for all users")
    whom = export.add_mutually_exclusive_group(required=True)
    whom.add_argument("--user", metavar="USER_ID", help="fold this user's gate into one LoRA")
    whom.add_argument("--prototypes", type=int, metavar="M", help="cluster all users' gates into M LoRAs")
    export.add_argument("--output", required=True, metavar="FOLDER", help="where they go")
    export.add_argument(
        "--examples", type=int, default=100, metavar="N", help="held-out examples that measure M's cost (default 100)"
    )

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


def _load(parsed: argparse.Namespace):
    from recllm.recipe import load_recipe

    return load_recipe(parsed.recipe, parsed.overrides)


def _run(parsed: argparse.Namespace) -> None:
    from recllm import stages

    stages.run(_load(parsed), parsed.force)


def _convert(parsed: argparse.Namespace) -> None:
    recipe = _load(parsed)
    if parsed.preview is None:
        from recllm import stages

        stages.run_stage(recipe, "convert", force=True, workers=parsed.workers)
        return
    from recllm.convert.preview import preview
    from recllm.model.chat import token_counter

    print(preview(recipe, parsed.preview, token_counter(recipe.model.name_or_path)))


def _train(parsed: argparse.Namespace) -> None:
    from recllm import stages

    stages.fine_tune(_load(parsed), parsed.allow_template_mismatch)


def _evaluate(parsed: argparse.Namespace) -> None:
    from recllm import stages

    stages.run_stage(_load(parsed), "evaluate", force=True)


def _export(parsed: argparse.Namespace) -> None:
    from pathlib import Path

    from recllm import stages

    if parsed.prototypes is not None and parsed.prototypes < 1:
        raise UserError(f"--prototypes {parsed.prototypes}: at least 1 is needed")
    stages.export(_load(parsed), Path(parsed.output), parsed.user, parsed.prototypes, max(parsed.examples, 0))


def _compare(parsed: argparse.Namespace) -> None:
    from pathlib import Path

    from recllm.evaluate.compare import compare

    print(compare([Path(report) for report in parsed.reports], parsed.metric))


def _fetch(_: argparse.Namespace) -> None:
    from recllm.data import offline

    offline.fetch_all()


def _list(_: argparse.Namespace) -> None:
    from recllm import assets

    for kind in assets.KINDS:
        print(f"{kind}:", *assets.names(kind), sep="\n  ")


if __name__ == "__main__":
    sys.exit(main())
