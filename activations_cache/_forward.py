"""Forwards with hooks on the sites: each value is cut to the stored rows, checked, cast and measured as it appears.

On a GPU nothing here waits for the device: values, extremes and moments are copied to pinned memory on a stream of
their own while the next forward runs, and are looked at when the writer asks for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor

from activations_cache import sites as site_catalogue
from activations_cache.documents import Tokens
from activations_cache.errors import ActivationsCacheError, ModelError, NumericsError, SiteError
from activations_cache.plan import IntArray
from activations_cache.positions import Selection
from activations_cache.store import LARGEST, LOGPROB, TORCH_TYPES, AnyArray, Moments, SiteSpec

GROUP_ROWS = 64  # rows that moments sum in float32
HEAD_TOKENS = 1024  # log-probabilities are taken of so many positions at a time: [1024, d_vocab] in float32


@dataclass(frozen=True)
class Rows:
    """What one batch adds to a cache.

    Attributes:
        sites: Per site the raw values of the stored rows [rows, *shape], sequence after sequence in the batch's order,
            and their moments (None for integer sites).
        fields: Per further row field its values [rows]: "logprob" in float32, where asked for.
    """

    sites: dict[str, tuple[AnyArray, Moments | None]]
    fields: dict[str, AnyArray] = field(default_factory=dict)


class _Enough(BaseException):
    """Ends a forward once every site is read. No `Exception`, so that no handler inside a model takes it."""


class Forward:
    """Runs batches of sequences through a model; a context manager, so that hooks and modes are undone.

    Args:
        hf: The bare model. It is in eval mode meanwhile; then each module gets its own mode back.
        specs: The sites to read, and how they are stored.
        tokens: Token ids of the sequences.
        selection: Which positions are stored.
        device: Where inputs go.
        logprobs: Also give each stored row log p(its token | all before it) of the model, in nats. The forward then
            runs to its end, the unembedding included; otherwise it stops after the last site.
        batch_tokens: Named in the message if the forward runs out of memory.
    """

    def __init__(
        self,
        hf: Any,
        specs: Sequence[SiteSpec],
        tokens: Tokens,
        selection: Selection,
        *,
        device: torch.device,
        logprobs: bool = False,
        batch_tokens: int = 0,
    ) -> None:
        self.hf, self.tokens, self.selection, self.device = hf, tokens, selection, device
        self.specs = {spec.name: spec for spec in specs}
        self.logprobs, self.batch_tokens = logprobs, batch_tokens
        self._pending: dict[str, _Pending] = {}
        self._stored = _Stored(None, None, np.zeros(0, np.int64))
        self._room = Room()

    def __enter__(self) -> Forward:
        self._open = ExitStack()
        self._open.callback(_restore_modes, [(module, module.training) for module in self.hf.modules()])
        self.hf.eval()
        self._open.enter_context(torch.no_grad())
        self._open.enter_context(site_catalogue.hooked(self.hf, dict.fromkeys(self.specs, self._read)))
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()

    def run(self, batch: IntArray) -> Batch:
        """One forward over the sequences `batch`; its rows are had from the result, in any thread.

        Raises:
            ModelError: The forward ran out of memory.
            NumericsError: A value is NaN or does not fit its storage type (on a GPU: when the result is asked for).
            SiteError: The forward did not reach a site.
        """
        self._pending = {}
        ids, mask = self._pad(batch)
        try:
            with self._memory(ids):
                output = self.hf(input_ids=ids, attention_mask=mask, use_cache=False)
                logprob = self._logprob(output.logits, ids) if self.logprobs else None
        except _Enough:
            logprob = None
        missing = sorted(set(self.specs) - set(self._pending))
        if missing:
            raise SiteError(f"the forward did not reach {missing}: these modules did not run for this input")
        return Batch(self._pending, logprob)

    def _memory(self, ids: Tensor) -> ExitStack:
        stack = ExitStack()
        stack.push(lambda _kind, error, _trace: self._out_of_memory(error, ids))
        return stack

    def _out_of_memory(self, error: BaseException | None, ids: Tensor) -> bool:
        """Turn an error that is about memory into our own; every other goes on as it is."""
        if not isinstance(error, torch.OutOfMemoryError | MemoryError | RuntimeError) or not _is_memory(error):
            return False
        raise ModelError(
            f"the forward of a batch of {ids.shape[0]} x {ids.shape[1]} tokens ran out of memory; free some and run "
            "the same capture again to go on, or capture into a new directory with batch_tokens below "
            f"{self.batch_tokens}"
        ) from error

    def _pad(self, batch: IntArray) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Right-padded ids and mask; sets which of the flattened positions are stored."""
        rows = [self.tokens.input_ids[number] for number in batch.tolist()]
        lengths = torch.tensor([len(row) for row in rows])
        width = int(lengths.max())
        ids = torch.zeros(len(rows), width, dtype=torch.long)  # id 0 is as good as any under the mask
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.as_tensor(np.asarray(row))
        mask = torch.arange(width) < lengths[:, None]  # [batch, pos]
        self._stored = self._choose(batch, mask, lengths)
        return ids.to(self.device), mask.long().to(self.device)

    def _choose(self, batch: IntArray, mask: Tensor, lengths: Tensor) -> _Stored:
        selection, width = self.selection, mask.shape[1]
        if selection.kind == "all":
            stored = mask
        elif selection.kind == "last":
            stored = torch.arange(width) == lengths[:, None] - 1
        else:
            stored = torch.zeros_like(mask)
            for number, sequence in enumerate(batch.tolist()):
                stored[number, torch.as_tensor(np.asarray(selection.of(sequence), np.int64))] = True
        keep = None if bool(stored.all()) else stored.flatten().nonzero().squeeze(1).to(self.device)
        counts = stored.sum(1)  # [batch]
        return _Stored(
            keep, counts.to(self.device) if selection.pool else None, np.repeat(batch, self._rows_of(counts))
        )

    def _rows_of(self, counts: Tensor) -> IntArray:
        return np.ones(len(counts), np.int64) if self.selection.pool else counts.numpy()

    def _read(self, value: Shaped[Tensor, "batch pos *shape"], site: Any) -> None:
        spec = self.specs[site.name]
        rows = self._stored.rows(value.detach().reshape(-1, *spec.shape))  # [rows, *shape]
        self._pending[spec.name] = _Pending(spec, rows, self._stored.sequences, self._room)
        if len(self._pending) == len(self.specs) and not self.logprobs:
            raise _Enough

    def _logprob(self, logits: Float[Tensor, "batch pos d_vocab"], ids: Int[Tensor, "batch pos"]) -> Tensor:
        """log p(token | all before it) of the stored rows, in float32; NaN for a first token."""
        batch, width = ids.shape
        found = torch.full((batch, width), torch.nan, device=logits.device)
        flat, wanted = logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1, 1).to(logits.device)
        parts = [
            (part.float().log_softmax(-1)).gather(1, want).squeeze(1)
            for part, want in zip(flat.split(HEAD_TOKENS), wanted.split(HEAD_TOKENS), strict=True)
        ]
        if parts:
            found[:, 1:] = torch.cat(parts).reshape(batch, width - 1)
        return self._stored.scalars(found.reshape(-1)).cpu()


@dataclass(frozen=True)
class _Stored:
    """Which rows of a flattened [batch * pos] value are stored.

    Attributes:
        keep: Their numbers, or None for all.
        pooled: Selected positions of each sequence of the batch, where they are averaged.
        sequences: Sequence of each stored row.
    """

    keep: Int[Tensor, " rows"] | None
    pooled: Int[Tensor, " batch"] | None
    sequences: IntArray

    def rows(self, flat: Shaped[Tensor, "all *shape"]) -> Shaped[Tensor, "rows *shape"]:
        if self.keep is not None:
            flat = flat.index_select(0, self.keep.to(flat.device))
        if self.pooled is None:
            return flat
        # one running sum per sequence, so that the order of additions is fixed on a GPU too
        lengths = self.pooled.to(flat.device)
        mean = torch.segment_reduce(flat.flatten(1).float(), "mean", lengths=lengths, axis=0)
        return mean.reshape(-1, *flat.shape[1:])

    def scalars(self, flat: Float[Tensor, " all"]) -> Float[Tensor, " rows"]:
        """The same of one number per position; a mean leaves out what is NaN (a first token's log-probability)."""
        kept = flat if self.keep is None else flat.index_select(0, self.keep.to(flat.device))
        if self.pooled is None:
            return kept
        return torch.stack([part.nanmean() for part in kept.split(self.pooled.tolist())])


class Room:
    """Memory that batches use one after the other: fresh memory is slow to touch, and a batch needs much of it."""

    def __init__(self) -> None:
        self._free: dict[str, list[Tensor]] = {}
        self._scratch = torch.empty(0)

    def take(self, spec: SiteSpec, rows: int) -> Shaped[Tensor, "more *shape"]:
        """Room for that many rows of a site or more, until it is given back."""
        held = self._free.setdefault(spec.name, [])
        found = held.pop() if held else None
        if found is None or len(found) < rows:
            found = torch.empty(rows, *spec.shape, dtype=TORCH_TYPES[spec.dtype])
        return found

    def give_back(self, spec: SiteSpec, taken: Shaped[Tensor, "more *shape"]) -> None:
        """What was taken is not needed any more; any thread may say so."""
        self._free[spec.name].append(taken)

    def scratch(self, flat: Shaped[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """Room for a float32 copy of some rows, until the next is asked for."""
        if self._scratch.numel() < flat.numel():
            self._scratch = torch.empty(flat.numel())
        return self._scratch[: flat.numel()].view_as(flat)


class _Pending:
    """One site's stored rows of one batch, perhaps still on their way from the device."""

    def __init__(self, spec: SiteSpec, rows: Tensor, sequences: IntArray, room: Room) -> None:
        self.spec, self.sequences, self.room = spec, sequences, room
        self.extremes: Tensor | None = None
        self.moments: _RawMoments | None = None
        self.arrived: Any = None  # the event that says so, on a GPU
        measured = spec.floating and len(rows) > 0
        if rows.is_cuda:
            # a copy: the model may go on to change its tensor in place
            stored = rows.to(TORCH_TYPES[spec.dtype], copy=True)
            if measured:
                self.moments = _raw_moments(stored.flatten(1))
                self.extremes = torch.stack(rows.aminmax()).double()
            self._fetch(stored)
        else:
            self.taken = room.take(spec, len(rows))
            self.stored = self.taken[: len(rows)].copy_(rows)
            if measured:
                flat = self.stored.flatten(1)
                self.moments = _raw_moments(flat, room.scratch(flat))
                if not math.isfinite(float(self.moments.norm_sum)):
                    self._look_at(rows)

    def give_back(self) -> None:
        """The rows have been put elsewhere."""
        if self.arrived is None:
            self.room.give_back(self.spec, self.taken)

    def _look_at(self, rows: Tensor) -> None:
        """The sum of norms is finite only if every stored value is: else find out whether one is not."""
        self.extremes = torch.stack(rows.aminmax()).double()
        self._check()

    def _fetch(self, stored: Tensor) -> None:
        """Start copies to pinned memory on a stream of their own, behind what the forward has queued so far."""
        copies = _copy_stream(stored.device)  # a layer's own device: a model may be spread over several
        copies.wait_stream(torch.cuda.current_stream(stored.device))
        with torch.cuda.stream(copies):
            self.stored = _to_pinned(stored, copies)
            if self.extremes is not None and self.moments is not None:
                self.extremes = _to_pinned(self.extremes, copies)
                self.moments = _RawMoments(*(_to_pinned(part, copies) for part in self.moments.parts))
            self.arrived = torch.cuda.Event()
            self.arrived.record(copies)

    def finish(self) -> tuple[AnyArray, Moments | None]:
        """The raw rows in RAM and their moments.

        Raises:
            NumericsError: A value is NaN or does not fit the storage type.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
            self._check()
        if not self.spec.floating:
            return _raw(self.stored), None
        if self.moments is None:
            return _raw(self.stored), Moments.empty(self.spec.shape)
        return _raw(self.stored), self.moments.finish(self.stored)

    def _check(self) -> None:
        if self.extremes is None:
            return
        low, high = self.extremes.tolist()  # both are NaN if any value is
        largest = max(-low, high) if low == low and high == high else math.nan
        limit = LARGEST[self.spec.dtype]
        if largest <= limit:
            return
        bad = ~(self.stored.flatten(1).float().abs() <= limit).all(1)  # what does not fit was stored as infinity
        if not bool(bad.any()):
            return  # above the limit, and rounded to it
        name, where = self.spec.name, f"in sequence {int(self.sequences[int(bad.nonzero()[0])])}"
        if math.isnan(largest):
            raise NumericsError(f"{name} is NaN {where}; check the model's weights and the input")
        if math.isinf(largest):
            raise NumericsError(f"{name} is infinite {where}; run the model in bfloat16 or float32")
        raise NumericsError(
            f"{name} reaches {largest:.6g} {where}, beyond {self.spec.dtype}'s {limit:g}; capture it with "
            f'dtype={{"{name}": "bfloat16"}} (or "float32") into a new directory'
        )


class Batch:
    """The result of one forward; `rows()` waits for what is still on its way from the device."""

    def __init__(self, pending: Mapping[str, _Pending], logprob: Float[Tensor, " rows"] | None) -> None:
        self._pending, self._logprob = pending, logprob

    def rows(self) -> Rows:
        """The stored rows of every site, in RAM.

        Raises:
            NumericsError: A value is NaN or does not fit its storage type.
        """
        fields = {} if self._logprob is None else {LOGPROB: self._logprob.numpy()}
        return Rows({name: pending.finish() for name, pending in self._pending.items()}, fields)

    def give_back(self) -> None:
        """The rows have been put elsewhere: their memory may be used again, and they must not be looked at."""
        for pending in self._pending.values():
            pending.give_back()
        self._pending = {}


@dataclass(frozen=True)
class _RawMoments:
    """Moments as tensors, which need not have arrived yet: mean [n], m2 [n] and the sum of norms, in float64."""

    mean: Float64[Tensor, " n"]
    m2: Float64[Tensor, " n"]
    norm_sum: Float64[Tensor, ""]

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.mean, self.m2, self.norm_sum

    def finish(self, stored: Tensor) -> Moments:
        """As numbers; where float32 squares overflowed, from the rows again in float64."""
        if not (math.isfinite(float(self.norm_sum)) and bool(self.m2.isfinite().all())):
            return _raw_moments(stored.flatten(1).double()).as_numbers(stored)
        return self.as_numbers(stored)

    def as_numbers(self, stored: Tensor) -> Moments:
        shape = tuple(stored.shape[1:])
        mean, m2 = (part.cpu().numpy().reshape(shape) for part in (self.mean, self.m2))
        return Moments(len(stored), mean, m2, float(self.norm_sum))


def batch_moments(rows: Shaped[Tensor, "rows *shape"]) -> Moments:
    """Mean, centred second moment and norms of some rows, summed in float64."""
    return _raw_moments(rows.flatten(1)).finish(rows) if len(rows) else Moments.empty(tuple(rows.shape[1:]))


def _raw_moments(flat: Float[Tensor, "rows n"], scratch: Float[Tensor, "rows n"] | None = None) -> _RawMoments:
    """The values are shifted by their mean before they are squared, so that the sums lose no more than the rows' own
    rounding, without a copy of the batch in float64.

    Args:
        flat: The rows, in any float type; float64 is summed as it is, all others in float32.
        scratch: Memory for the shifted rows.
    """
    flat = flat.cpu() if flat.device.type == "mps" else flat  # which has no float64
    exact = flat if flat.dtype in (torch.float32, torch.float64) else _float(flat, scratch)
    norms = torch.linalg.vector_norm(exact, dim=1).sum(dtype=torch.float64)
    shift = exact.mean(0)  # [n]
    centred = torch.sub(exact, shift) if scratch is None else torch.sub(exact, shift, out=scratch)
    first = _total(centred)  # [n], near 0
    second = _total(centred.square_())  # [n]
    m2 = (second - first**2 / len(flat)).clamp_(min=0)
    return _RawMoments(shift.double() + first / len(flat), m2, norms)


def _float(flat: Float[Tensor, "rows n"], scratch: Float[Tensor, "rows n"] | None) -> Float[Tensor, "rows n"]:
    return flat.float() if scratch is None else scratch.copy_(flat)


def _total(rows: Float[Tensor, "rows n"]) -> Float64[Tensor, " n"]:
    """Sum over rows: in the rows' type within groups, in float64 across them, which saves a pass in float64."""
    whole = len(rows) // GROUP_ROWS * GROUP_ROWS
    rest = rows[whole:].sum(0, dtype=torch.float64)
    if not whole:
        return rest
    groups = rows[:whole].view(-1, GROUP_ROWS, rows.shape[1]).sum(1)  # [groups, n]
    return rest + groups.sum(0, dtype=torch.float64)


@cache
def _copy_stream(device: torch.device) -> Any:
    """The stream on which one device's values travel."""
    return torch.cuda.Stream(device)


def _to_pinned(tensor: Tensor, stream: Any) -> Tensor:
    tensor.record_stream(stream)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _raw(stored: Tensor) -> AnyArray:
    """The bits of a tensor in RAM; bfloat16, which numpy lacks, as uint16."""
    host = stored.contiguous()
    return host.view(torch.int16).numpy().view("<u2") if host.dtype == torch.bfloat16 else host.numpy()


def _restore_modes(modes: Sequence[tuple[torch.nn.Module, bool]]) -> None:
    """Give each module its own mode back; `train()` on the whole would set all of them alike."""
    for module, training in modes:
        module.training = training


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, ActivationsCacheError):
        return False
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
