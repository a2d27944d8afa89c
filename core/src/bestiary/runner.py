"""One rank: the rows of a step in, the chosen tokens out. Knows tensors and slots, not requests or text."""

from array import array
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from bestiary import adapters, hub, model
from bestiary.ahead import Ahead
from bestiary.architecture import Architecture
from bestiary.batch import Batch, Crossing, Pages, Slots, Vectors
from bestiary.blocks import Adaptable, Decoder, Embedding, Lanes, Over, Pooler, Update
from bestiary.bursts import Bursts
from bestiary.cache import CacheGroup, store
from bestiary.checkpoint import Checkpoint, ConfigFile
from bestiary.config import EngineConfig
from bestiary.encoding import Encoding
from bestiary.errors import SettingError
from bestiary.inputs import Item, Look
from bestiary.parallel import Mesh
from bestiary.replay import Replays
from bestiary.sampling.sampler import sample, top_logprobs
from bestiary.step import StepResult, StepRow
from bestiary_kernels.memory import keep_freed

__all__ = ["Runner"]


#: Vectors of the items seen last that are kept, so that a prompt in chunks, or asked again, is encoded once.
_ENCODED = 16384


#: What ranks settle on together: each has its own idea of how many blocks it has room for.
Agree = Callable[[tuple[CacheGroup, ...]], tuple[CacheGroup, ...]]


class Runner:
    """A model, or this rank's part of it, its cache and the device that they live on."""

    def __init__(
        self,
        config: EngineConfig,
        architecture: Architecture,
        folder: Path,
        mesh: Mesh | None = None,
        agree: Agree = tuple,
    ) -> None:
        self._mesh, self._config, self._lanes = mesh or Mesh(), config, Lanes()
        #: Adapters by key, and who is in a slot.
        self._adapters: dict[str, dict[str, list[Update]]] = {}
        self._seated: dict[int, str] = {}
        file = ConfigFile.load(folder)
        self.device = model.choose_device(config.device)
        dtype = model.choose_dtype(config.dtype, file)
        self._dtype = dtype
        tree, self._names, others = model.describe(architecture, file)
        kinds = model.kinds(model.keeps(tree))
        self.vocabulary, self.width = tree.embed.vocabulary, tree.embed.width
        self.pools = tree.head.tokens if isinstance(tree.head, Pooler) else None
        self.block_size = config.block_size
        if config.max_model_len is not None and config.max_model_len > tree.context:
            raise SettingError(f"max_model_len={config.max_model_len}: the model was made for {tree.context} tokens")
        longest = config.max_model_len or tree.context
        build = partial(
            model.build,
            tree,
            self._names,
            dtype=dtype,
            device=self.device,
            length=longest,
            mesh=self._mesh,
            quantization=config.quantization,
        )
        self._model = build(None) if config.load_format == "dummy" else _filled(build, folder, others)
        kept = model.keeps(self._model)
        self.groups = agree(store.groups(config, kept, kinds, dtype, longest, self.device))
        self.max_model_len = store.fit_length(config, tree.context, self.groups)
        self._caches = store.allocate(kept, kinds, self.groups, self.block_size, dtype, self.device)
        self.most_crossed = max((group.crossed or 0 for group in self.groups), default=0)
        encoder = self._model.encoder if self._mesh.is_first else None
        self.encoding = Encoding(encoder, _ENCODED, dtype, self.device)
        if self.device.type == "cpu":  # what was loaded has gone its way; from here on all steps ask for the same
            keep_freed()
        self._replays: Replays | None = None
        #: Who computes what steps that follow will ask for.
        self.ahead: Ahead | Bursts | None = None
        if self._mesh.is_alone:
            where = self.block_size, self.max_model_len
            self._replays = Replays(self._model, self._caches, kinds, *where, self._lanes, self.device)
            if self.device.type == "cuda":  # whose host would keep it waiting
                self.ahead = Ahead(self._replays, self.groups, *where)
            elif all(group.fixed is None for group in self.groups):  # a state is gone once the next but one is there
                self.ahead = Bursts(self._replays, *where)

    def execute(self, rows: Sequence[StepRow]) -> list[StepResult]:
        """Run one step. Safe to repeat: a row writes the same keys and values into its own blocks each time.

        Of several ranks one has results, and the others none.
        """
        return self._now(rows) if self.ahead is None else self.ahead.execute(rows, self._now)

    def _now(self, rows: Sequence[StepRow]) -> list[StepResult]:
        found = None if self._replays is None else self._replays.run(rows)
        if found is not None:
            return [StepResult(choice) for choice in found.choices([row.sampling for row in rows if row.sampling])]
        try:
            return self._step(rows)
        except Exception:
            self._mesh.send_failure()
            raise

    @torch.inference_mode()
    def _step(self, rows: Sequence[StepRow]) -> list[StepResult]:
        # First of all what the stage before sends, or the next step would find it.
        stream_TD, crossed_ND = (None, self._crossed(rows)) if self._mesh.is_first else self._received(rows)
        wanted = [_output_rows(row) for row in rows]
        self._steer(rows, wanted)
        hidden_RD = self._model(self._batch(rows, wanted, crossed_ND), stream_TD)
        if not self._mesh.is_last:
            self._mesh.send(hidden_RD, *(() if crossed_ND is None else (crossed_ND,)))
            return []
        if hidden_RD.shape[0] == 0:
            return [StepResult() for _ in rows]
        logits_RV = self._model.logits(hidden_RD)
        return _choose(logits_RV, rows, [len(w) for w in wanted]) if self._mesh.answers else []

    def _received(self, rows: Sequence[StepRow]) -> tuple[Tensor, Tensor | None]:
        """The stream of the stage before, and vectors that sequences begin to look at."""
        tokens = sum(len(row.tokens) for row in rows)
        vectors = sum(row.inputs.num_crossed for row in rows if not row.is_crossed)
        stream_TD, crossed_ND = (
            torch.empty(n, self.width, dtype=self._dtype, device=self.device) for n in (tokens, vectors)
        )
        found = (stream_TD, crossed_ND) if vectors else (stream_TD,)
        self._mesh.receive(*found)
        return stream_TD, crossed_ND if vectors else None

    def encode(self, item: Item, adapter: int = -1) -> Tensor:
        """[vectors, width] of what a prompt brings, to a request with this slot."""
        with torch.inference_mode():
            return self._encoded(item, adapter)

    def _encoded(self, item: Item, adapter: int) -> Tensor:
        key = self._seated.get(adapter, "")
        touched = any(path.startswith("encoder.") or path == "embed" for path in self._adapters.get(key, ()))
        with self._lanes.encoding(adapter if touched else -1):
            return self.encoding(item, key if touched else "")

    # ---- adapters ----------------------------------------------------------------------------------------------------

    def add_adapter(self, key: str, folder: Path) -> bytes:
        """Read an adapter and remember it; its digest. Raises AdapterError, and nothing has changed."""
        adapter = adapters.read(folder, self._config.max_lora_rank)
        leaves = dict(model.leaves(self._model))
        placed = adapters.place(adapter, self._names, leaves, lambda path: model.is_elsewhere(path, self._model))
        self._adapters[key] = {path: [self._moved(update) for update in updates] for path, updates in placed.items()}
        return adapter.digest

    def place_adapter(self, key: str, slot: int) -> None:
        """Fill a slot with a remembered adapter. Leaves that none touched before get room for it."""
        updates = self._adapters[key]
        for path, leaf in model.leaves(self._model):
            if not isinstance(leaf, Adaptable | Embedding):
                continue
            if path in updates and leaf.low is None:
                config = self._config
                leaf.adapt(self._lanes, config.max_loras, config.max_lora_rank, self._dtype, self.device)
                if self._replays is not None:
                    self._replays.forget()
            if leaf.low is not None:
                leaf.low.write(slot, updates.get(path, ()))
        self._seated[slot] = key

    def remove_adapter(self, key: str) -> None:
        """Forget an adapter. Its slot stays as it is until another one is placed there."""
        self._adapters.pop(key, None)

    def _moved(self, update: Update) -> Update:
        down, up = (self._move(matrix.to(self._dtype)) for matrix in (update.down, update.up))
        return Update(update.part, down, up, update.index)

    def _steer(self, rows: Sequence[StepRow], wanted: Sequence[range]) -> None:
        """Say which slot each row of the step uses."""
        if all(row.adapter < 0 for row in rows):
            self._lanes.set({})
            return
        slots = torch.tensor([row.adapter for row in rows], dtype=torch.int32)
        counts: dict[Over, list[int]] = {
            "tokens": [len(row.tokens) for row in rows],
            "outputs": [len(want) for want in wanted],
            "vectors": [0 if row.is_crossed else row.inputs.num_crossed for row in rows],
        }
        repeats = {over: slots.repeat_interleave(torch.tensor(count)) for over, count in counts.items()}
        self._lanes.set({over: self._move(rows_) for over, rows_ in repeats.items()})

    def _batch(self, rows: Sequence[StepRow], wanted: Sequence[range], crossed_ND: Tensor | None) -> Batch:
        """The step as tensors."""
        counts = [len(row.tokens) for row in rows]
        starts = [0, *accumulate(counts)]
        flat_tokens, positions, outputs = array("q"), array("q"), array("q")
        for row, first, want in zip(rows, starts, wanted, strict=False):
            flat_tokens.extend(row.tokens)
            positions.extend(range(row.start, row.start + len(row.tokens)))
            outputs.extend(range(first + want.start, first + want.stop))
        position_T = torch.frombuffer(positions, dtype=torch.int64)
        sequence_T = torch.repeat_interleave(torch.tensor(counts))
        numbered = list(enumerate(self.groups))
        every = len(outputs) == len(flat_tokens)
        return Batch(
            token_ids=self._move(torch.frombuffer(flat_tokens, dtype=torch.int64)),
            positions=self._move(position_T),
            query_starts=self._move(torch.tensor(starts, dtype=torch.int32)),
            context_lens=self._move(
                torch.tensor([row.start + n for row, n in zip(rows, counts, strict=True)], dtype=torch.int32)
            ),
            pages={g: self._pages(g, rows, position_T, sequence_T) for g, group in numbered if not group.is_constant},
            states={g: self._states(g, rows) for g, group in numbered if group.fixed is not None},
            output_rows=None if every else self._move(torch.tensor(outputs, dtype=torch.int64)),
            caches=self._caches,
            crossings={g: self._crossing(g, rows, crossed_ND) for g, group in numbered if group.crossed is not None},
            vectors=self._vectors(rows, starts) if self._mesh.is_first else None,
            prefixes=self._prefixes(rows),
            axes=self._axes(rows),
        )

    def _vectors(self, rows: Sequence[StepRow], starts: Sequence[int]) -> Vectors | None:
        """What stands in the place of some tokens' embeddings in this step."""
        places: list[int] = []
        values: list[Tensor] = []
        for row, first in zip(rows, starts, strict=False):
            for span in row.inputs.spans:
                found, which = span.between(row.start, row.start + len(row.tokens))
                if found:
                    places.extend(first - row.start + place for place in found)
                    values.append(self._encoded(span.item, row.adapter)[which.start : which.stop])
        return Vectors(self._move(torch.tensor(places)), torch.cat(values)) if places else None

    def _crossed(self, rows: Sequence[StepRow]) -> Tensor | None:
        """[N, width] what sequences begin to look at."""
        new = [(item, row.adapter) for row in rows if not row.is_crossed for item in row.inputs.crossed]
        return torch.cat([self._encoded(*one) for one in new]) if new else None

    def _crossing(self, group: int, rows: Sequence[StepRow], crossed_ND: Tensor | None) -> Crossing:
        """What each sequence looks at beside its tokens, and what of it is new."""
        size, slots = self.block_size, array("q")
        for row in rows:
            if row.inputs.crossed and not row.is_crossed:
                slots.extend(row.blocks[group][i // size] * size + i % size for i in range(row.inputs.num_crossed))
        return Crossing(
            blocks=self._move(_table(rows, group)),
            lens=self._move(torch.tensor([row.inputs.num_crossed for row in rows], dtype=torch.int32)),
            vectors=crossed_ND,
            slots=None if crossed_ND is None else self._move(torch.frombuffer(slots, dtype=torch.int64)),
            nobody=not any(row.inputs.crossed for row in rows),
            **{name: self._move(tensor) for name, tensor in _looks(rows).items()},
        )

    def _prefixes(self, rows: Sequence[StepRow]) -> Tensor | None:
        """How many tokens at each sequence's start see each other both ways."""
        found = [row.inputs.prefix for row in rows]
        return self._move(torch.tensor(found, dtype=torch.int32)) if any(found) else None

    def _axes(self, rows: Sequence[StepRow]) -> Tensor | None:
        """[axes, T] positions, where a prompt has several axes of them."""
        given = next((row.inputs.axes for row in rows if row.inputs.axes is not None), None)
        if given is None:
            return None
        return self._move(torch.cat([_axes_of(row, given.shape[0]) for row in rows], 1))

    def _pages(self, group: int, rows: Sequence[StepRow], position_T: Tensor, sequence_T: Tensor) -> Pages:
        """Tables of blocks, and where each token's keys and values go."""
        table_SB, size = _table(rows, group), self.block_size
        slot_T = table_SB[sequence_T, position_T // size] * size + position_T % size
        return Pages(self._move(table_SB), self._move(slot_T))

    def _states(self, group: int, rows: Sequence[StepRow]) -> Slots:
        """The slots that a step reads and writes, and whose state is only beginning."""
        read, write = (torch.tensor([row.blocks[group][i] for row in rows]) for i in (0, 1))
        fresh = torch.tensor([row.start == 0 for row in rows])
        return Slots(self._move(read), self._move(write), self._move(fresh))

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)


def _filled(build: Callable[[Checkpoint], Decoder], folder: Path, others: Sequence[model.Other]) -> Decoder:
    """The model with a checkpoint's weights, and those of others that it is made of."""
    with Checkpoint.open(folder) as checkpoint:
        for other in others:
            checkpoint.adopt(Checkpoint.open(hub.locate(other.model)), other.prefix, other.within)
        return build(checkpoint)


def _table(rows: Sequence[StepRow], group: int) -> Tensor:
    """[S, B] int32, the blocks of each row, padded with 0."""
    longest = max(1, *(len(row.blocks[group]) for row in rows))
    tables = array("i")
    for row in rows:
        tables.extend(row.blocks[group])
        tables.extend([0] * (longest - len(row.blocks[group])))
    return torch.frombuffer(tables, dtype=torch.int32).view(len(rows), longest)


def _looks(rows: Sequence[StepRow]) -> dict[str, Tensor]:
    """By name in `Crossing` what differs from token to token; nothing of what is alike for all."""
    found: dict[str, Tensor] = {}
    if len({bool(row.inputs.crossed) for row in rows}) > 1:
        counts = torch.tensor([len(row.tokens) for row in rows])
        found["looking"] = torch.tensor([bool(row.inputs.crossed) for row in rows]).repeat_interleave(counts)
    if any(row.inputs.looks for row in rows):
        table_T3 = torch.cat([_looks_of(row) for row in rows])
        found |= {"ranges": table_T3[:, :2].contiguous(), "heeds": table_T3[:, 2].bool()}
    return found


def _looks_of(row: StepRow) -> Tensor:
    """[tokens, 3] int32: what each of a row's tokens looks at, from and to, and whether it heeds that."""
    looks = row.inputs.looks or (Look(0, 0, row.inputs.num_crossed),)
    starts = torch.tensor([look.start for look in looks])
    places = torch.arange(row.start, row.start + len(row.tokens))
    known = torch.tensor([(look.first, look.end, look.heeds) for look in looks], dtype=torch.int32)
    return known[torch.searchsorted(starts, places, right=True) - 1]


def _axes_of(row: StepRow, num_axes: int) -> Tensor:
    """[axes, tokens] the positions of a row's tokens: the prompt's own, and beyond it one further for each token."""
    start, end, own = row.start, row.start + len(row.tokens), row.inputs.axes
    known = torch.empty(num_axes, 0, dtype=torch.int64) if own is None else own[:, start:end]
    first = start + known.shape[1]
    return torch.cat((known, (torch.arange(first, end) + row.inputs.shift).expand(num_axes, -1)), 1)


def _output_rows(row: StepRow) -> range:
    """Which of a row's tokens need logits, or vectors."""
    if row.num_vectors:
        return range(len(row.tokens) - row.num_vectors, len(row.tokens))
    if row.prompt_logprobs is not None and row.successors:
        return range(len(row.tokens) if row.sampling else len(row.successors))
    return range(len(row.tokens) - 1, len(row.tokens)) if row.sampling else range(0)


def _choose(logits_RV: Tensor, rows: Sequence[StepRow], counts: Sequence[int]) -> list[StepResult]:
    """Sample where a row's sequence goes on; read the prompt's log-probabilities, or vectors, where they are wanted."""
    results = [StepResult() for _ in rows]
    ends = list(accumulate(counts))
    for row, result, end, count in zip(rows, results, ends, counts, strict=True):
        if row.num_vectors:
            result.vectors = logits_RV[end - count : end].float().cpu()
        if row.prompt_logprobs is not None and row.successors:
            first = logits_RV[end - count : end - count + len(row.successors)]
            chosen = torch.tensor(row.successors, device=logits_RV.device)
            result.prompt = top_logprobs(first, chosen, [row.prompt_logprobs] * len(row.successors))
    sampling = [i for i, row in enumerate(rows) if row.sampling is not None]
    if sampling:
        last_RV = logits_RV if len(sampling) == logits_RV.shape[0] else logits_RV[[ends[i] - 1 for i in sampling]]
        for i, choice in zip(sampling, sample(last_RV, [r for row in rows if (r := row.sampling)]), strict=True):
            results[i].choice = choice
    return results
