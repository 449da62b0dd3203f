"""Running a plan of generation: in memory, in a folder that keeps what is done, or in a folder by several processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from activations_cache import store
from activations_cache._decoding import alone
from activations_cache._generation_plan import Plan
from activations_cache._generations import (
    Generations,
    Labelled,
    batch_file,
    from_rows,
    read_batch,
    read_folder,
    read_head,
    write_batch,
    write_head,
)
from activations_cache.errors import CacheError, CacheMismatchError


def run_in_memory(plan: Plan, progress: bool) -> Generations:
    """Generate everything and keep it."""
    numbers = range(len(plan.batches))
    with bar_of(plan, numbers, progress) as bar:
        return from_rows([row for _, rows in batches_of(plan, numbers, bar.update) for row in rows])


def run_in_folder(plan: Plan, folder: Path, resume: bool, progress: bool) -> Generations:
    """Generate what the folder does not hold yet."""
    with opened(plan, folder, resume) as missing, bar_of(plan, missing, progress) as bar:
        for number, rows in batches_of(plan, missing, bar.update):
            write_batch(folder, plan.identity, number, rows)
    return read_folder(folder)


def bar_of(plan: Plan, missing: Iterable[int], progress: bool) -> Any:
    """A progress bar over all continuations, those that are done counted."""
    from tqdm.auto import tqdm

    total = sum(map(len, plan.batches))
    done = total - sum(len(plan.batches[number]) for number in missing)
    return tqdm(total=total, initial=done, unit="text", desc="generate", disable=not progress)


def batches_of(
    plan: Plan, numbers: Iterable[int], after: Callable[[int], Any] = int
) -> Iterator[tuple[int, list[Labelled]]]:
    """Generate some batches; a model that has nothing to do is left as it is.

    Args:
        plan: The run.
        numbers: Which batches.
        after: Called with the number of continuations of each batch once the caller is through with it.
    """
    todo = list(numbers)
    if not todo:
        return
    with alone(plan.hf):
        for number in todo:
            yield number, plan.run(number)
            after(len(plan.batches[number]))


@contextmanager
def opened(plan: Plan, folder: Path, resume: bool) -> Iterator[list[int]]:
    """Hold a folder for this run, with its manifest written; gives the numbers of the batches that it lacks.

    Every batch that it holds is compared with its SHA-256 first.

    Raises:
        CacheLockedError: Another process holds it.
        CacheError: It is a file, holds something else, or cannot be written.
        CacheMismatchError: It holds another run's generations.
        CorruptCacheError: A file was altered.
    """
    _held(plan, folder, resume)  # a folder that is refused is left as it is, without a lock in it
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with store.writer_lock(folder):
            held = _held(plan, folder, resume)  # again, now that nobody else can write
            store.remove_partials(folder)
            if held is None:
                write_head(folder, plan.manifest)
            numbers = range(len(plan.batches))
            missing = [number for number in numbers if read_batch(folder, plan.identity, number) is None]
            if held is not None and missing:
                _warn_of_changes(plan, held, folder)
            with _noted(plan, folder):
                yield missing
    except OSError as error:
        raise CacheError(
            f"{folder} cannot be written: {error}. What was committed is intact: make room or give access, and run "
            "the same again to go on"
        ) from error


@contextmanager
def _noted(plan: Plan, folder: Path) -> Iterator[None]:
    """Whatever ends the run early says how to go on."""
    try:
        yield
    except BaseException as error:
        done = sum((folder / batch_file(number)).is_file() for number in range(len(plan.batches)))
        error.add_note(
            f"{done} of {len(plan.batches)} batches are committed in {folder}; the same with resume=True goes on"
        )
        raise


def _held(plan: Plan, folder: Path, resume: bool) -> dict[str, Any] | None:
    """The manifest of the folder if it holds batches of this very run; None if it holds nothing.

    Raises:
        CacheError: It holds something else; or generations, and `resume` is False.
        CacheMismatchError: It holds another run's generations.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise CacheError(f"{folder} is a file; a folder for the generations is required")
    names = {path.name for path in folder.iterdir() if not path.name.endswith(store.PARTIAL)} - {store.LOCK}
    if store.MANIFEST not in names:
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise CacheError(f"{folder} is not empty ({shown}) and holds no generations; choose an empty or new one")
        return None
    if not resume:
        raise CacheError(
            f"{folder} already holds generations, and resume=False: nothing is overwritten. Choose another directory, "
            "delete this one yourself, or pass resume=True"
        )
    held = read_head(folder)
    if held["identity"] != plan.identity:
        if not any(name.startswith("batch-") for name in names):
            return None  # another run that was stopped before it had generated anything
        raise CacheMismatchError(
            f"{folder} holds other generations. Different: {differences(held['facts'], plan.manifest['facts'])}. "
            "Choose another directory, or generate with the same model, prompts and settings"
        )
    return held


def _warn_of_changes(plan: Plan, held: Mapping[str, Any], folder: Path) -> None:
    parts = ("libraries", "machine")
    pairs = [
        (name, held.get(part, {}).get(name), value) for part in parts for name, value in plan.manifest[part].items()
    ]
    changed = [name for name, before, now in pairs if before != now]
    if changed:
        warnings.warn(
            f"{folder} was begun with another {', '.join(changed)}; what is still to come may differ from an "
            "uninterrupted run's where two tokens are as good as equal",
            stacklevel=5,
        )


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """In which facts two runs differ, in words."""
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if len(names) > 1 and "plan of batches" in names:
        names.remove("plan of batches")  # follows from the others
    return "; ".join(_difference(name, theirs.get(name), ours.get(name)) for name in names)


def _difference(name: str, held: Any, asked: Any) -> str:
    if isinstance(held, str) and isinstance(asked, str) and len(held) == len(asked) == 64:
        held, asked = held[:8], asked[:8]
    return f"{name} ({held!r} there, {asked!r} asked for)"
