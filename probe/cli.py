"""The `probe` command. Arguments are parsed before anything heavy is imported; errors are one line and exit code 2."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from probe import _cli_audit

__all__ = ["main"]

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0, 1 for a check that failed, 2 for an error, 130 for Ctrl-C)."""
    arguments = _parser().parse_args(argv)
    # Standard tokenizers fork-warn otherwise, and their threads fight with torch's on few cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with warnings.catch_warnings():
        warnings.showwarning = _note
        return _guarded(arguments)


def _guarded(arguments: argparse.Namespace) -> int:
    try:
        if getattr(arguments, "out", None) is not None:
            _check_out(arguments)
        command: Command = arguments.command
        return command(arguments)
    except KeyboardInterrupt:
        print(
            "probe: stopped; finished shards and trained models are kept, for the same command again", file=sys.stderr
        )
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `probe ... | head` is no error
        return 0
    except Exception as error:
        if arguments.debug or not _expected(error):
            raise
        print(f"probe: error: {_in_flags(' '.join(str(error).split()))}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(f"probe: note: {_in_flags(' '.join(note.split()))}", file=sys.stderr)
        return 2


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """A warning of ours as one line; those of libraries about themselves are not the user's business."""
    if category is UserWarning:
        print(f"probe: note: {_in_flags(' '.join(str(message).split()))}", file=sys.stderr)


# The library's messages name its arguments; here they are flags.
_FLAGS = {
    "overwrite=True": "--overwrite",
    "resume=False": "--no-resume",
    "the same capture with resume=True": "the same command",
    "chat=False": "no --chat",
    'overflow="truncate"': "--overflow truncate",
    "overflow='truncate'": "--overflow truncate",
    "text_column=": "--text-column ",
    'dtype="float32"': "--dtype float32",
    "do_sample=True": "--sample",
    "do_sample=False": "no --sample",
    "max_new_tokens": "--max-new-tokens",
    "n_samples": "--samples",
    "batch_tokens": "--batch-tokens",
    "max_length=": "--max-length ",
}


def _in_flags(message: str) -> str:
    for argument, flag in _FLAGS.items():
        message = message.replace(argument, flag)
    return message


def _check_out(a: argparse.Namespace) -> None:
    """Refuse, before anything is computed, an output that the command would write over or into."""
    from probe.errors import ProbeError

    if a.out.exists() and not a.out.is_dir():
        raise ProbeError(f"--out {a.out} is a file; a directory is needed.")
    if getattr(a, "overwrite", None) is False and a.out.exists() and any(a.out.iterdir()):
        raise ProbeError(f"--out {a.out} exists and is not empty; give another, or --overwrite.")


def bars() -> bool:
    """Progress bars in a terminal, none in a file or a pipe (transformers' own too)."""
    if sys.stderr.isatty():
        return True
    from transformers.utils import logging

    logging.disable_progress_bar()
    return False


def _expected(error: Exception) -> bool:
    from activations_cache.errors import ActivationsCacheError
    from probe.errors import ProbeError
    from saes.errors import SAEError

    return isinstance(error, ProbeError | ActivationsCacheError | SAEError | OSError)


def _parser() -> argparse.ArgumentParser:
    from probe import __version__

    parser = argparse.ArgumentParser(
        prog="probe",
        description="Find where a language model holds something, cut it out of the weights, prove it, export it.",
        epilog="Start with `probe demo`. Every command has --help.",
    )
    parser.add_argument("--version", action="version", version=f"probe {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_demo, _add_run, _add_capture, _add_generate, _add_cache, _add_sae, _add_patch):
        add(commands)
    for add in (_add_experts, _add_edit):
        add(commands)
    _cli_audit.add_organism(commands, _add, _add_overwrite)
    _cli_audit.add_audit(commands, _add, _add_overwrite)
    _add_export(commands)
    return parser


def _add(commands: Any, name: str, text: str, command: Command, example: str = "") -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example: {example}" if example else None,
    )
    made.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    made.set_defaults(command=command)
    return made


def _group(commands: Any, name: str, text: str) -> Any:
    made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    return made.add_subparsers(metavar="ACTION", required=True)


def _add_demo(commands: Any) -> None:
    made = _add(
        commands,
        "demo",
        "walk the whole road on a small model with a known secret",
        _demo,
        "probe demo --out runs/demo",
    )
    made.add_argument("--out", type=Path, default=Path("runs/demo"), help="run directory (default: runs/demo)")
    made.add_argument(
        "--size", choices=("default", "small"), default="default", help="size of the models trained for it"
    )
    made.add_argument(
        "--gold", type=int, metavar="N", help="gold retrains that never learned the secret; a verdict needs 5"
    )
    made.add_argument("--no-progress", action="store_true", help="no progress bars")


def _add_run(commands: Any) -> None:
    made = _add(commands, "run", "walk the road that a recipe describes", _run, "probe run recipe.yaml --out runs/mine")
    made.add_argument("recipe", type=Path, help="YAML file (its schema: probe/recipe.schema.json)")
    made.add_argument("--out", type=Path, help="run directory (default: runs/NAME-OF-THE-RECIPE)")
    made.add_argument("--no-progress", action="store_true", help="no progress bars")


def _add_model(parser: argparse.ArgumentParser, name: str = "model") -> None:
    parser.add_argument(name, help="hub name or directory")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--model-dtype", help="floating-point type of the weights (default: the checkpoint's)")


def _add_capture(commands: Any) -> None:
    example = "probe capture gpt2 --data texts.jsonl --site 'blocks.*.hook_resid_post' --out acts/"
    made = _add(commands, "capture", "store activations of some sites in a cache", _capture, example)
    _add_model(made)
    made.add_argument("--data", type=Path, required=True, help="txt, json, jsonl, csv or parquet")
    made.add_argument("--site", action="append", required=True, help="site or pattern; may be given several times")
    made.add_argument("--out", type=Path, required=True, help="cache directory")
    made.add_argument(
        "--dtype",
        action="append",
        metavar="[PATTERN=]TYPE",
        help="storage type float16, bfloat16 or float32, of all sites or of those that fit (default: the model's)",
    )
    made.add_argument(
        "--positions",
        choices=("all", "last", "answer", "mask"),
        default="all",
        help="tokens to store: all, each text's last, those of the column `answer`, those marked in the column `mask`",
    )
    made.add_argument("--pool", choices=("mean",), help="store one row per text: the mean over its positions")
    made.add_argument("--logprobs", action="store_true", help="store each token's log-probability too")
    made.add_argument("--compression", choices=("gzip", "lzf"), help="smaller and much slower (default: none)")
    made.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="padded tokens per forward")
    made.add_argument("--shard-rows", type=int, metavar="N", help="rows per file (default: about 128 MiB)")
    made.add_argument("--n-tokens", type=int, metavar="N", help="capture exactly so many tokens (default: all)")
    made.add_argument(
        "--max-length", type=int, metavar="N", help="longest text in tokens (default: the model's context)"
    )
    made.add_argument(
        "--overflow", choices=("truncate", "split", "error"), default="truncate", help="what to do with longer texts"
    )
    made.add_argument("--text-column", default="text", metavar="NAME")
    made.add_argument("--columns", nargs="*", metavar="NAME", help="label columns to keep (default: all)")
    made.add_argument("--token-columns", nargs="*", metavar="NAME", help="columns with one value per token to keep")
    made.add_argument(
        "--bos", action=argparse.BooleanOptionalAction, help="beginning-of-sequence token (default: the tokenizer's)"
    )
    made.add_argument("--chat", action="store_true", help="wrap each text in the chat template")
    made.add_argument("--no-resume", action="store_true", help="refuse to go on with a cache that was begun before")


def _add_generate(commands: Any) -> None:
    example = "probe generate gpt2 --data prompts.jsonl --site 'blocks.*.hook_resid_post' --out acts/"
    made = _add(commands, "generate", "continue prompts, and store activations of what is said", _generate, example)
    _add_model(made)
    made.add_argument("--data", type=Path, required=True, help="prompts: txt, json, jsonl, csv or parquet")
    made.add_argument("--site", action="append", help="site or pattern; may be repeated; none keeps the texts alone")
    made.add_argument("--out", type=Path, required=True, help="cache directory")
    made.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    made.add_argument("--sample", action="store_true", help="draw tokens (default: the most probable one)")
    made.add_argument("--temperature", type=float, default=1.0)
    made.add_argument("--top-p", type=float, default=1.0)
    made.add_argument("--top-k", type=int, default=0, metavar="N", help="0 draws from all tokens")
    made.add_argument("--samples", type=int, default=1, metavar="N", help="continuations per prompt")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated")
    made.add_argument("--no-eos", action="store_true", help="go on after an end-of-sequence token")
    made.add_argument("--positions", choices=("all", "generated", "prompt", "last"), help="default: all")
    made.add_argument("--pool", choices=("mean",), help="one row per sequence: the mean over these positions")
    made.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="storage type (default: the model's)")
    made.add_argument("--batch-tokens", type=int, default=8192, metavar="N")
    made.add_argument("--shard-rows", type=int, metavar="N")
    made.add_argument("--max-length", type=int, metavar="N", help="longest prompt and continuation in tokens")
    made.add_argument("--text-column", default="text", metavar="NAME")
    made.add_argument("--columns", nargs="*", metavar="NAME", help="label columns to keep (default: all)")
    made.add_argument("--bos", action=argparse.BooleanOptionalAction, help="as in capture")
    made.add_argument("--chat", action="store_true", help="wrap each prompt in the chat template")
    made.add_argument("--no-resume", action="store_true", help="refuse to go on with what was begun before")


def _add_cache(commands: Any) -> None:
    actions = _group(commands, "cache", "look into a cache, or check it")
    shown = _add(actions, "info", "show what is inside a cache", _cache_info, "probe cache info acts/")
    shown.add_argument("directory", type=Path)
    _add_cache_verify(actions)
    _add_cache_export(actions)


def _add_cache_verify(actions: Any) -> None:
    text = "check every byte of a cache, and perhaps repair it; exits with 1 if something is damaged"
    made = _add(actions, "verify", text, _cache_verify, "probe cache verify acts/ --repair --data texts.jsonl")
    made.add_argument("directory", type=Path)
    made.add_argument("--json", action="store_true", help="print what is damaged as JSON")
    made.add_argument("--repair", action="store_true", help="capture again what is damaged, and that alone")
    made.add_argument("--model", help="for --repair: the model (default: the one that the cache names)")
    made.add_argument("--model-dtype", help="type to load it in (default: the one that the cache names)")
    made.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    made.add_argument("--data", type=Path, help="for --repair: the data, needed where a whole shard is gone")
    made.add_argument("--text-column", default="text", metavar="NAME")


def _add_cache_export(actions: Any) -> None:
    example = "probe cache export acts/ blocks.3.hook_resid_post rows.npy"
    made = _add(actions, "export", "write a site's rows to a .npy or .safetensors file", _cache_export, example)
    made.add_argument("directory", type=Path)
    made.add_argument("site")
    made.add_argument("file", type=Path, help="ends in .npy or .safetensors")
    made.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="type in the file (default: as stored)"
    )
    _add_overwrite(made)


def _add_sae(commands: Any) -> None:
    actions = _group(commands, "sae", "train or evaluate a sparse autoencoder on a cache")
    made = _add(
        actions,
        "train",
        "train an SAE from a cache",
        _sae_train,
        "probe sae train acts/ --site blocks.3.hook_resid_post --out sae/",
    )
    made.add_argument("cache", type=Path)
    made.add_argument("--site", required=True)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--architecture", default="topk")
    made.add_argument("--d-sae", type=int, required=True, metavar="N")
    made.add_argument("--k", type=int, default=32, metavar="N")
    made.add_argument("--tokens", type=int, metavar="N", help="rows to train on (default: one epoch)")
    made.add_argument("--seed", type=int, default=0)
    _add_overwrite(made)
    made = _add(
        actions,
        "eval",
        "evaluate an SAE on a cache",
        _sae_eval,
        "probe sae eval sae/ --cache acts/ --site blocks.3.hook_resid_post",
    )
    made.add_argument("sae", type=Path)
    made.add_argument("--cache", type=Path, required=True)
    made.add_argument("--site", required=True)


def _add_patch(commands: Any) -> None:
    made = _add(
        commands,
        "patch",
        "exact activation patching over a file of pairs",
        _patch,
        "probe patch gpt2 --pairs pairs.jsonl --out scores/",
    )
    _add_model(made)
    made.add_argument("--pairs", type=Path, required=True, help="jsonl with clean, corrupted, answer, wrong")
    made.add_argument(
        "--component", default="resid_pre", help="resid_pre, resid_mid, resid_post, attn_out, mlp_out or z"
    )
    made.add_argument("--direction", choices=("denoise", "noise"), default="denoise")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, help="directory for the scores")
    _add_overwrite(made)


def _add_experts(commands: Any) -> None:
    made = _add(
        commands,
        "experts",
        "score experts by their routing on two sets of prompts",
        _experts,
        "probe experts MODEL --forget a.jsonl --retain b.jsonl --out scores/",
    )
    _add_model(made)
    made.add_argument("--forget", type=Path, required=True, help="texts of what is looked for")
    made.add_argument("--retain", type=Path, required=True, help="texts to compare with")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, help="directory for the scores")
    _add_overwrite(made)


def _add_edit(commands: Any) -> None:
    actions = _group(commands, "edit", "show an edit, or apply it to a checkpoint")
    made = _add(
        actions,
        "apply",
        "apply an edit to its base and write the edited model",
        _edit_apply,
        "probe edit apply --base MODEL --edit EDIT --out edited/",
    )
    _add_apply(made, required=True)
    _add(actions, "show", "show what an edit changes", _edit_show, "probe edit show EDIT").add_argument(
        "edit", type=Path
    )


def _add_overwrite(made: argparse.ArgumentParser) -> None:
    made.add_argument("--overwrite", action="store_true", help="replace what is there")


def _add_apply(made: argparse.ArgumentParser, required: bool) -> None:
    made.add_argument("--base", required=True, help="hub name or directory of the base model")
    made.add_argument("--edit", type=Path, required=required, help="directory with edit.json and edit.safetensors")
    made.add_argument("--out", type=Path, required=True, help="directory for the edited model")
    _add_overwrite(made)
    made.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="floating-point type of the result")


def _add_export(commands: Any) -> None:
    made = _add(
        commands,
        "export",
        "write a model, edited or not, as a checked Hugging Face directory",
        _edit_apply,
        "probe export --base MODEL --edit EDIT --out edited/",
    )
    _add_apply(made, required=False)


def _demo(a: argparse.Namespace) -> int:
    from probe import recipe

    made = recipe.read(recipe.embedded("demo"))
    if a.size == "small":
        made["model"]["size"] = "small"
        made["experts"] = {**made["experts"], "size": "small"} if made["experts"] else False
    if a.gold is not None:
        made["audit"]["gold"] = a.gold
        made = recipe.resolve(made, "probe demo --gold")
    flags = ["--size", a.size] if a.size != "default" else []
    flags += ["--gold", str(a.gold)] if a.gold is not None else []
    return _walk(made, a.out, a.no_progress, shlex.join(["probe", "demo", *flags, "--out", str(a.out)]))


def _run(a: argparse.Namespace) -> int:
    from probe import recipe

    made = recipe.read(a.recipe)
    out = a.out or Path("runs") / a.recipe.stem
    return _walk(made, out, a.no_progress, shlex.join(["probe", "run", str(a.recipe), "--out", str(out)]))


def _walk(recipe: dict[str, Any], out: Path, no_progress: bool, command: str) -> int:
    from probe._run import run

    run(recipe, out, progress=not no_progress and bars(), command=command, quiet=False)
    return 0


def _load(a: argparse.Namespace) -> Any:
    from probe.models import load

    bars()
    return load(a.model, dtype=a.model_dtype, device=a.device)


def _capture(a: argparse.Namespace) -> int:
    import activations_cache as ac

    cache = ac.capture(
        _load(a), a.data, a.site, a.out, positions=a.positions, pool=a.pool, dtype=_storage_types(a.dtype),
        batch_tokens=a.batch_tokens, shard_rows=a.shard_rows, n_tokens=a.n_tokens, max_length=a.max_length,
        overflow=a.overflow, text_column=a.text_column, bos=a.bos, chat=a.chat, resume=not a.no_resume,
        columns=a.columns, token_columns=a.token_columns, logprobs=a.logprobs, compression=a.compression,
        progress=bars(),
    )  # fmt: skip
    print(cache.info())
    return 0


def _storage_types(given: list[str] | None) -> Any:
    """None, one type, or a mapping of patterns to types; a type without a pattern is for all sites."""
    pairs = [(value.rpartition("=")[0] or "*", value.rpartition("=")[2]) for value in given or []]
    return pairs[0][1] if len(pairs) == 1 and pairs[0][0] == "*" else dict(pairs) or None


def _generate(a: argparse.Namespace) -> int:
    import activations_cache as ac

    settings = {
        "max_new_tokens": a.max_new_tokens, "do_sample": a.sample, "temperature": a.temperature, "top_p": a.top_p,
        "top_k": a.top_k, "n_samples": a.samples, "seed": a.seed, "stop_strings": a.stop, "eos": not a.no_eos,
        "batch_tokens": a.batch_tokens, "max_length": a.max_length, "text_column": a.text_column, "bos": a.bos,
        "chat": a.chat, "resume": not a.no_resume, "columns": a.columns, "progress": bars(),
    }  # fmt: skip
    stored = {"positions": a.positions, "pool": a.pool, "dtype": a.dtype, "shard_rows": a.shard_rows}
    if not a.site:
        _refuse_without_site(stored)
        print(ac.generate(_load(a), a.data, out=a.out / "generations", **settings))
        return 0
    stored["positions"] = a.positions or "all"
    cache = ac.capture_generation(_load(a), a.data, a.site, a.out, **settings, **stored)
    print(ac.Generations.load(a.out))
    print(cache.info())
    return 0


def _refuse_without_site(stored: dict[str, Any]) -> None:
    from probe.errors import ProbeError

    given = ", ".join(f"--{name.replace('_', '-')}" for name, value in stored.items() if value is not None)
    if given:
        raise ProbeError(f"{given}: of no effect without --site, which says whose activations are stored.")


def _cache_info(a: argparse.Namespace) -> int:
    import activations_cache as ac

    print(ac.open(a.directory).info())
    return 0


def _cache_export(a: argparse.Namespace) -> int:
    import activations_cache as ac

    cache = ac.open(a.directory)
    cache.export(a.site, a.file, a.dtype, overwrite=a.overwrite, progress=bars())
    print(f"{a.file}: {len(cache)} rows of {a.site}")
    return 0


def _cache_verify(a: argparse.Namespace) -> int:
    import activations_cache as ac

    cache = ac.open(a.directory, check=False)
    problems = cache.verify(progress=bars())
    if a.json:
        print(json.dumps([problem.to_json() for problem in problems], indent=1))
    else:
        for line in (line for problem in problems for line in problem.lines):
            print(line)
    if problems and a.repair:
        print(_repaired(a, cache, problems))
        problems = ac.open(a.directory, check=False).verify()
    if a.json:
        return 1 if problems else 0
    whole = "" if cache.finished else " (an unfinished cache: the same capture goes on with it)"
    found = f"{len(problems)} problems" if problems else "every byte is as it was written"
    print(f"{a.directory}: {found}{whole}")
    if any(not problem.file.startswith("generations/") for problem in problems):
        needs = {part for problem in problems for part in problem.needs}
        data = " --data FILE" if "data" in needs else ""
        model = f" --model {cache.model.name}" if "model" in needs else ""
        print(
            f"to capture again what is damaged, and that alone: probe cache verify {a.directory} --repair{model}{data}"
        )
    return 1 if problems else 0


def _repaired(a: argparse.Namespace, cache: Any, problems: Any) -> Any:
    import activations_cache as ac
    from probe.models import load

    model = None
    if any(problem.needs for problem in problems):
        model = load(a.model or cache.model.name, dtype=a.model_dtype or cache.model.dtype, device=a.device)
    return ac.repair(a.directory, model, a.data, text_column=a.text_column, progress=bars())


def _sae_train(a: argparse.Namespace) -> int:
    import activations_cache as ac
    import saes

    cache = ac.open(a.cache)
    sae = saes.train(
        cache,
        a.site,
        architecture=a.architecture,
        d_sae=a.d_sae,
        k=a.k,
        n_tokens=a.tokens,
        seed=a.seed,
        out=a.out,
        progress=bars(),
    )
    print(saes.evaluate(sae, cache, a.site))
    print(f"SAE: {a.out}")
    return 0


def _sae_eval(a: argparse.Namespace) -> int:
    import activations_cache as ac
    import saes

    print(saes.evaluate(saes.load(a.sae), ac.open(a.cache), a.site))
    return 0


def _patch(a: argparse.Namespace) -> int:
    from probe import patching
    from probe.data import Pairs

    pairs = Pairs.load(a.pairs)
    return _tell(
        patching.patch(_load(a), pairs, component=a.component, direction=a.direction, seed=a.seed, progress=bars()),
        a.out,
    )


def _experts(a: argparse.Namespace) -> int:
    from probe import experts

    forget, retain = _prompts(a.forget), _prompts(a.retain)
    return _tell(experts.attribute(_load(a), forget, retain, seed=a.seed, progress=bars()), a.out)


def _prompts(path: Path) -> Any:
    """Questions where the file holds them; else the file itself, whose texts or token ids and groups are read."""
    from probe.data import Questions
    from probe.errors import DataError

    try:
        return Questions.load(path)
    except DataError:
        return path


def _tell(scores: Any, out: Path | None) -> int:
    print(scores)
    if out is not None:
        scores.save(out)
        scores.plot().write_html(out / "plot.html", include_plotlyjs=True)
        print(f"scores: {out}\nplot: {out / 'plot.html'}")
    return 0


def _edit_show(a: argparse.Namespace) -> int:
    from probe.editing import Edit

    print(Edit.load(a.edit))
    return 0


def _edit_apply(a: argparse.Namespace) -> int:
    from probe._export import export
    from probe.editing import Edit
    from probe.models import load

    bars()
    edit = Edit.load(a.edit) if a.edit else None
    print(export(load(a.base, device="cpu"), edit, a.out, overwrite=a.overwrite, dtype=a.dtype))
    return 0


def texts(path: Path) -> list[str]:
    from activations_cache import read_documents
    from probe.errors import DataError

    found = read_documents(path).texts
    if found is None:
        raise DataError(f"{path} holds token ids; texts are needed here.")
    return list(found)


if __name__ == "__main__":
    sys.exit(main())
