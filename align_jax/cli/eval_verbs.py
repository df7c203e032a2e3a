"""The verb `align eval`: arguments and what it prints. The work is done in evals/."""

import argparse
import ast
import dataclasses
import difflib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_jax.cli import model_verbs, output

if TYPE_CHECKING:
    from align_jax.align import Align
    from align_jax.evals import Evaluator


def add_verbs(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verb by `add_verb(name, function of (args, rest), help) -> parser`."""
    evaluate = add_verb("eval", _evaluate, "run evaluators on a trained model")
    evaluate.epilog = (
        "example: align eval --workdir runs/quickstart --retrieval 'scenes?size=256&seed=5' "
        "--zeroshot 'scenes?size=256&seed=6&label=shape' --template 'a picture of a {}'; "
        "or align eval --model kakaobrain/align-base --config configs/eval_small.py --skip-missing"
    )
    evaluate.set_defaults(takes_config=True)
    model_verbs.add_model(evaluate, "--workdir", "--model", required=False)
    evaluate.add_argument(
        "--config", metavar="FILE", help="config whose eval.evaluators run; FILE:ROOT names data"
    )
    evaluate.add_argument(
        "--only", default="", metavar="NAME,...", help="of the config's evaluators, these"
    )
    evaluate.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME.KEY=VALUE",
        help="argument of an evaluator of the config; repeatable",
    )
    evaluate.add_argument(
        "--skip-missing",
        action="store_true",
        help="leave out evaluators whose data are not there, and say which",
    )
    evaluate.add_argument(
        "--retrieval", action="append", default=[], metavar="SOURCE", help="pairs; repeatable"
    )
    evaluate.add_argument(
        "--zeroshot",
        action="append",
        default=[],
        metavar="SOURCE",
        help="labelled images; repeatable. With neither nor --config, the run's evaluators run",
    )
    evaluate.add_argument(
        "--template",
        action="append",
        default=[],
        help="prompt with {} for the class name; repeatable, or one .json/.txt file of prompts",
    )
    evaluate.add_argument(
        "--out", metavar="FILE", help="JSON; default for a workdir: WORKDIR/eval/align_eval.json"
    )
    evaluate.add_argument(
        "--format",
        action="append",
        default=[],
        metavar="NAME[:DIR]",
        help="also write the files of clip_benchmark, mteb or open_clip; repeatable; default for "
        "a workdir: WORKDIR/eval/NAME",
    )
    evaluate.add_argument(
        "--follow",
        metavar="WORKDIR",
        help="evaluate the checkpoints of a run as they appear, until it is complete, into "
        "WORKDIR/eval/followed_STEP.json",
    )
    evaluate.add_argument(
        "--report",
        nargs="+",
        metavar="RESULT",
        help="no evaluation: JSON files or workdirs side by side and beside published numbers; "
        "with --out FILE.md as Markdown, and a picture in FILE.png",
    )


def _evaluate(args: argparse.Namespace, rest: list[str]) -> None:
    if args.report:
        return _report(args)
    if args.follow:
        return _follow(args, rest)
    if not args.model:
        raise ValueError("--model (or --workdir) is missing: what shall be evaluated?")

    from align_jax import align, evals
    from align_jax.evals import image_classifier, peers, tables

    output.check_report(args.out, ".json")
    chosen = _choose(args, rest)
    formats = _formats(args)
    evaluators, skipped = _make(chosen, args.skip_missing)
    if image_classifier.is_workdir(args.model):
        model = image_classifier.load(args.model, step=args.step)
    else:
        model = align.load(args.model, step=args.step)
    config = model.origin.config  # None: no workdir of ours
    if not chosen and config is not None:
        chosen = _change(config.eval.evaluators.to_dict(), args)
        evaluators, skipped = _make(chosen, args.skip_missing)
    if not evaluators:
        reason = "give --config, --retrieval or --zeroshot"
        if skipped:
            reason = f"the data of none of the {len(skipped)} are there, see above"
        raise ValueError(f"{args.model} has no evaluator to run: {reason}.")
    results = evals.run_evaluators(evaluators, model)
    out = args.out or (config is not None and Path(args.model) / "eval" / "align_eval.json")
    if out:
        provenance = _provenance(model, chosen, evaluators, skipped)
        evals.write_json(out, results, provenance, evals.problems_of(evaluators))
    written = [out] if out else []
    step = model.origin.step
    for form, folder in formats.items():
        written += peers.write(
            form,
            folder,
            results,
            evaluators,
            model=model.origin.name,
            pretrained="align_jax" if step is None else f"step{step}",
        )
    print(tables.format_table(results, evaluators))
    for name, reason in skipped.items():
        print(f"{name}: not run: {reason}")
    for path in written:
        print(f"wrote {path}")


def _provenance(
    model: "Align",
    chosen: dict[str, dict[str, Any]],
    evaluators: list["Evaluator"],
    skipped: dict[str, str],
) -> dict[str, Any]:
    from align_jax import evals

    return {
        "workdir": model.origin.name,
        "step": model.origin.step,
        "model_fingerprint": model.fingerprint(),
        "evaluators": chosen,
        "protocols": evals.protocols(chosen, evaluators, model),
        "skipped": skipped,
    }


_POLL_S = 5.0


def _follow(args: argparse.Namespace, rest: list[str]) -> None:
    """Evaluates every checkpoint that the run has when it is looked at, and new ones later on."""
    for option in ("model", "step", "out", "format"):
        if getattr(args, option):
            raise ValueError(
                f"--follow WORKDIR names model, steps and files itself; no --{option}."
            )
    from align_jax import align, evals
    from align_jax.evals import tables
    from align_jax.run import readers, trained, workdir

    path, model = Path(args.follow), None
    config = workdir.load_config(path)
    chosen = _choose(args, rest) or _change(config.eval.evaluators.to_dict(), args)
    evaluators, skipped = _make(chosen, args.skip_missing)
    if not evaluators:
        raise ValueError(f"{path} has no evaluator to run: give --config, --retrieval, --zeroshot.")
    missed: set[int] = set()
    while True:
        last = workdir.load_config(path).train.steps
        for step in sorted(_steps_of(path) - missed):
            out = path / "eval" / f"followed_{step:08d}.json"
            if out.exists():
                continue
            try:
                with readers.reading(path, step):
                    if model is None:
                        model = align.load(path, step=step)
                    else:
                        model.variables = trained.load_trained(path, step=step).variables
                        model.origin = dataclasses.replace(model.origin, step=step)
            except readers.Gone:
                missed.add(step)
                print(f"step {step}: removed before it was read", file=sys.stderr, flush=True)
                continue
            results = evals.run_evaluators(evaluators, model)
            provenance = _provenance(model, chosen, evaluators, skipped)
            evals.write_json(out, results, provenance, evals.problems_of(evaluators))
            print(f"step {step}\n{tables.format_table(results, evaluators)}", flush=True)
        if last in missed or (path / "eval" / f"followed_{last:08d}.json").exists():
            return
        time.sleep(_POLL_S)


def _steps_of(path: Path) -> set[int]:
    found = (path / "checkpoints").glob("[0-9]*")
    return {int(folder.name) for folder in found if folder.name.isdecimal()}


def _report(args: argparse.Namespace) -> None:
    from align_jax.evals import comparison
    from align_jax.storage import writing

    output.check_report(args.out, ".md")
    found = comparison.compare(args.report)
    text = comparison.to_markdown(found)
    written = []
    if args.out:
        picture = Path(args.out).with_suffix(".png")
        writing.write_text(args.out, text)
        comparison.write_picture(picture, found)
        written = [args.out, picture]
    for warning in (*found.warnings.values(), *found.departures.values()):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    print(text, end="")
    for path in written:
        print(f"wrote {path}")


def _formats(args: argparse.Namespace) -> dict[str, str | Path]:
    """Returns format -> folder of what --format asks for."""
    from align_jax.evals import peers
    from align_jax.storage import writing

    found: dict[str, str | Path] = {}
    for text in args.format:
        form, _, folder = text.partition(":")
        if form not in peers.FORMATS:
            known = ", ".join(peers.FORMATS)
            raise ValueError(f"--format {form!r} is unknown; use one of: {known}.")
        if not folder and not (Path(args.model) / "checkpoints").is_dir():
            raise ValueError(f"--format {form}: {args.model} is no workdir; add :DIR to say where.")
        writing.check_local(folder, f"--format {form}")
        found[form] = folder or Path(args.model) / "eval" / form
    return found


def _choose(args: argparse.Namespace, rest: list[str]) -> dict[str, dict[str, Any]]:
    """Returns the evaluators that the arguments name: name -> type and arguments."""
    from align_jax import config as config_lib

    if args.template and not args.zeroshot:
        raise ValueError("--template is of no use without --zeroshot SOURCE.")
    chosen = {}
    for number, source in enumerate(args.retrieval):
        chosen[f"retrieval{number or ''}"] = {"type": "retrieval", "source": source}
    for number, source in enumerate(args.zeroshot):
        entry = {"type": "zeroshot", "source": source}
        if args.template:
            entry["templates"] = model_verbs.read_templates(args.template)
        chosen[f"zeroshot{number or ''}"] = entry
    if args.config and chosen:
        raise ValueError("Give either --config or --retrieval and --zeroshot.")
    if args.config:
        chosen = config_lib.load_config(args.config, rest).eval.evaluators.to_dict()
        if not chosen:
            raise ValueError(f"{args.config} has no eval.evaluators.")
    return _change(chosen, args) if chosen else chosen


def _change(
    chosen: dict[str, dict[str, Any]], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Returns the evaluators that --only leaves, with what --set says."""
    for change in args.set:
        place, equals, text = change.partition("=")
        name, dot, key = place.rpartition(".")
        if not (equals and dot):
            raise ValueError(f"--set {change!r} must look like NAME.KEY=VALUE.")
        _check_name(name, chosen, "--set")
        chosen[name][key] = _value(text)
    only = [name for name in args.only.split(",") if name]
    for name in only:
        _check_name(name, chosen, "--only")
    return {name: entry for name, entry in chosen.items() if not only or name in only}


def _check_name(name: str, chosen: dict[str, Any], option: str) -> None:
    if name not in chosen:
        close = difflib.get_close_matches(name, chosen, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"{option}: no evaluator '{name}'.{hint} There are: {', '.join(chosen)}.")


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a word, a path
        return text


def _make(
    chosen: dict[str, dict[str, Any]], skip_missing: bool
) -> tuple[list["Evaluator"], dict[str, str]]:
    """Returns evaluators, and the reasons of those that are left out."""
    from align_jax import evals

    evaluators, skipped = [], {}
    for name, entry in chosen.items():
        try:
            evaluators.append(evals.make_evaluator(name, entry))
        except ValueError as error:
            if not skip_missing or "does not exist" not in str(error):
                raise
            # What else could stand there is of no interest to somebody who lacks the file.
            skipped[name] = str(error).removeprefix(f"Evaluator '{name}': ").partition(";")[0]
            print(f"{name} is left out: {skipped[name]}", file=sys.stderr, flush=True)
    return evaluators, skipped
