"""What a rank computes, sends and keeps in a step, in closed form: from the papers and from docs/parallel.md, not from a run.

benchmarks.plan prints these beside the trace, and the tests compare the two.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

from . import flops
from .trainer import DTYPES, Settings

SPLIT = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")  # the backward of inputs and of weights apart
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")  # the last stage is on the first rank
TWO_STAGES = ("LoopedBFS", "Interleaved1F1B", *SPLIT)  # a rank has two


@dataclass(frozen=True)
class Place:
    """Which rank of a run: settings, sizes, and the numbers of the stages that it has."""

    settings: Settings
    replicas: int
    pipeline_rank: int
    replica: int

    @property
    def stage_count(self) -> int:
        s = self.settings
        return 1 if s.pipeline_parallel == 1 else s.pipeline_parallel * (2 if s.schedule in TWO_STAGES else 1)

    @property
    def stages(self) -> list[int]:
        s, p, r = self.settings, self.settings.pipeline_parallel, self.pipeline_rank
        if p == 1:
            return [0]
        return [r, 2 * p - 1 - r] if s.schedule in V_SHAPED else list(range(r, self.stage_count, p))

    def rank_of(self, stage: int) -> int:
        """The pipeline rank that has a stage."""
        p = self.settings.pipeline_parallel
        return 2 * p - 1 - stage if self.settings.schedule in V_SHAPED and stage >= p else stage % p

    @property
    def first(self) -> bool:
        return 0 in self.stages

    @property
    def last(self) -> bool:
        return self.stage_count - 1 in self.stages

    @property
    def layers(self) -> int:
        """Of all stages of the rank."""
        return self.settings.layers // self.stage_count * len(self.stages)

    @property
    def fsdp(self) -> bool:
        """Whether FSDP2 wraps the stages, which a single replica only has for its mixed precision."""
        return self.settings.data_parallel == "fsdp" and (self.replicas > 1 or self.settings.master_weights)

    @property
    def kept_bytes(self) -> int:
        """Of an element of a parameter, its gradient and the optimizer's state."""
        return 4 if self.settings.master_weights else DTYPES[self.settings.dtype].itemsize

    @property
    def computed_bytes(self) -> int:
        """Of an element of an activation."""
        return DTYPES[self.settings.dtype].itemsize


def splits(place: Place) -> bool:
    """Whether the gradients of inputs and of weights are computed apart."""
    return place.settings.pipeline_parallel > 1 and place.settings.schedule in SPLIT


@dataclass(frozen=True)
class Shape:
    """A parameter's share on a tensor-parallel rank; `replicated` over that group."""

    size: tuple[int, ...]
    replicated: bool = False

    def sharded(self, replicas: int, replica: int) -> int:
        """Elements that FSDP2 leaves to one of the replicas: rows in equal shares, rounded up."""
        share = -(-self.size[0] // replicas)
        return max(0, min(share, self.size[0] - share * replica)) * prod(self.size[1:])

    def padded(self, replicas: int) -> int:
        """Elements that FSDP2 gathers: every share of one size."""
        return -(-self.size[0] // replicas) * replicas * prod(self.size[1:])


def layer(place: Place) -> list[Shape]:
    """12 parameters: two layer norms, and four products with their biases."""
    config, t = place.settings.config, place.settings.tensor_parallel
    h, f = config.hidden_size, config.ffn_hidden_size
    return [*[Shape((h,), True)] * 4, Shape((3 * h // t, h)), Shape((3 * h // t,)), Shape((h, h // t)), Shape((h,), True),
            Shape((f // t, h)), Shape((f // t,)), Shape((h, f // t)), Shape((h,), True)]


def outside(place: Place, stage: int) -> list[Shape]:
    """The parameters of a stage that are in no layer."""
    config, t = place.settings.config, place.settings.tensor_parallel
    h, first, last = config.hidden_size, stage == 0, stage == place.stage_count - 1
    return ([Shape((config.padded_vocab_size // t, h))] * (first or last)
            + [Shape((config.max_position_embeddings, h), True)] * first + [Shape((h,), True)] * 2 * last)


def parameters(place: Place) -> list[Shape]:
    """Every parameter of the rank; a tied token table is two where first and last stage are two."""
    return layer(place) * place.layers + [one for stage in place.stages for one in outside(place, stage)]


def held(place: Place) -> list[int]:
    """Elements of each parameter that the rank holds."""
    return [one.sharded(place.replicas, place.replica) if place.fsdp else prod(one.size) for one in parameters(place)]


def memory(place: Place) -> dict[str, int]:
    """Bytes of parameters, their gradients, and AdamW's two moments with a float32 step count for each parameter.

    Where rows do not divide, FSDP2's last shares of parameters have as much memory as the others.
    """
    elements, e = held(place), place.kept_bytes
    whole = sum(one.padded(place.replicas) for one in parameters(place)) // place.replicas if place.fsdp else sum(elements)
    return {"parameters": whole * e, "gradients": whole * e, "optimizer": 2 * sum(elements) * e + 4 * len(elements)}


def rank_flops(place: Place, target: str) -> dict[str, int | None]:
    """A replica's batch, this rank's part, by phase: forward and backward are `flops.model_flops` together, and recomputed is what
    `flops.hardware_flops` adds, which is a limit.

    attention="sdpa" forms the scores again in its backward; where it drops out, a CPU keeps the probabilities. On a CPU attention
    without it leaves out what `flops.omitted_flops` says. None: the backward of linear layers runs twice there, where a schedule
    splits it.
    """
    s, t = place.settings, place.settings.tensor_parallel
    of_layers = place.layers * flops.layer_flops(s.config, s.batch, s.sequence) // t
    of_head = flops.head_flops(s.config, s.batch, s.sequence) * place.last // t
    again = 2 * place.layers * s.batch * s.sequence ** 2 * s.hidden // t if s.attention == "sdpa" and s.dropout == 0 else 0
    early = s.fuse_linear_loss  # the head's gradients are formed in the forward
    found: dict[str, int | None] = {"forward": of_layers + of_head * (3 if early else 1),
                                    "backward": 2 * of_layers + of_head * (0 if early else 2) + again,
                                    "recomputed": of_layers * s.recompute}
    if target == "cpu" and s.attention == "softmax":
        omitted = flops.omitted_flops(s.config, s.batch, s.sequence) * place.layers // s.layers // t // 3
        found = {name: value and value - omitted * {"forward": 1, "backward": 2, "recomputed": 1}[name]
                 for name, value in found.items()}
    if target == "cpu" and splits(place):
        found["backward"] = None
    return found


Call = tuple[str, str, str, int]  # phase, kind, group, bytes of the whole tensor


def collectives(place: Place) -> Counter[Call] | None:
    """How often what is sent in a step. "schedule" is the phase of what a pipeline's stages exchange.

    DDP's gradients are one all-reduce here, which torch cuts into buckets; and the loss that never holds the logits
    (fuse_linear_loss) one all-gather a microbatch, which is cut into chunks of tokens. None where layers are run again for a
    backward that a schedule splits: how often depends on how torch groups the weights.
    """
    found: Counter[Call] = Counter()
    s = place.settings
    if splits(place) and s.recompute:
        return None
    for group, size in (("tp", s.tensor_parallel), ("dp", place.replicas), ("pp", s.pipeline_parallel)):
        if size > 1:
            found["update", "all_reduce", group, 8] += 1  # the norm that gradients are clipped to
    if s.tensor_parallel > 1:
        _tensor_parallel(place, found)
    if place.replicas > 1:
        _data_parallel(place, found)
    if s.pipeline_parallel > 1:
        _pipeline(place, found)
    return +found


def activation_bytes(place: Place) -> int:
    """Of a microbatch's hidden states, whole."""
    s = place.settings
    return s.batch // s.microbatches * s.sequence * s.hidden * place.computed_bytes


def _tensor_parallel(place: Place, found: Counter[Call]) -> None:
    """The table of docs/parallel.md, for each microbatch. A layer that is run again sends again what its first half sends: torch
    stops before the last sum, which the backward does not need."""
    s, whole = place.settings, activation_bytes(place)
    again = place.layers * s.recompute
    statistics = s.batch // s.microbatches * s.sequence * 3 * s.tensor_parallel * (8 if s.dtype == "fp64" else 4)
    each = 2 * place.layers
    if s.sequence_parallel:
        calls = {("forward", "all_gather"): each + place.last, ("forward", "reduce_scatter"): each + place.first,
                 ("recomputed", "all_gather"): 2 * again, ("recomputed", "reduce_scatter"): again,
                 ("backward", "all_gather"): each + place.first, ("backward", "reduce_scatter"): each + place.last}
        elements = sum(n for n, one in zip(held(place), parameters(place), strict=True) if one.replicated)
        found["update", "all_reduce", "tp", elements * place.kept_bytes] += 1
    else:
        calls = {("forward", "all_reduce"): each + place.first, ("recomputed", "all_reduce"): again,
                 ("backward", "all_reduce"): each + place.last}
    for (phase, kind), count in calls.items():
        found[phase, kind, "tp", whole] += count * s.microbatches
    found["forward", "all_gather", "tp", statistics] += place.last * s.microbatches


def _data_parallel(place: Place, found: Counter[Call]) -> None:
    s = place.settings
    if s.data_parallel == "ddp":
        found["backward", "all_reduce", "dp", sum(prod(one.size) for one in parameters(place)) * place.kept_bytes] += 1
        return
    pieces = s.microbatches if s.pipeline_parallel == 1 else 1  # stages of a pipeline keep what they gathered
    for stage in place.stages:
        layers = place.layers // len(place.stages)
        for shapes, count, again in ((layer(place), layers, s.pipeline_parallel == 1), (outside(place, stage), 1, False)):
            elements = sum(one.padded(place.replicas) for one in shapes)
            if elements:
                found["forward", "all_gather", "dp", elements * place.computed_bytes] += count * pieces
                found["backward", "all_gather", "dp", elements * place.computed_bytes] += count * pieces * again
                found["backward", "reduce_scatter", "dp", elements * place.kept_bytes] += count


def _pipeline(place: Place, found: Counter[Call]) -> None:
    """Hidden states to the next stage and their gradients to the one before, unless it is on this rank too; the loss; the tied
    table's gradient between the first stage and the last."""
    s, own = place.settings, place.pipeline_rank
    piece = activation_bytes(place) // (s.tensor_parallel if s.sequence_parallel else 1)
    for stage in place.stages:
        for other in (stage - 1, stage + 1):
            if 0 <= other < place.stage_count and place.rank_of(other) != own:
                found["schedule", "send", "pp", piece] += s.microbatches
    found["schedule", "broadcast", "pp", 8 if s.dtype == "fp64" else 4] += 1
    if place.first != place.last:
        table = Shape((s.config.padded_vocab_size // s.tensor_parallel, s.hidden))
        elements = table.sharded(place.replicas, place.replica) if place.fsdp else prod(table.size)
        found["update", "send", "pp", elements * place.kept_bytes] += 1


def korthikanti(place: Place) -> int | None:
    """Bytes of the layers' activations that a rank keeps at most for the backward, by Korthikanti et al. 2022 (arXiv 2205.05198).

    For a microbatch and layer, with e bytes an element (2 in the paper), t the tensor-parallel size and a the heads:
    s b h (4e + 2 + 12e/t) + a s^2 b (2e + 1) / t, equation 2; with sequence parallelism all of it over t, equation 4; recomputed
    in full s b h e (over t with sequence parallelism, where the layer's input is shared out), section 5. Without dropout its two
    masks are missing (2 s b h and 1 a s^2 b / t), and so is its result in attention (e a s^2 b / t). The paper's model is not ours:
    it says what to expect, not what will be. Microbatches in flight by schedule; None where the paper has no such schedule.
    """
    s, t, e = place.settings, place.settings.tensor_parallel, place.computed_bytes
    tokens = s.batch // s.microbatches * s.sequence
    p, r, m = s.pipeline_parallel, place.pipeline_rank, s.microbatches
    if p == 1:
        flight = 1
    elif s.schedule == "GPipe":
        flight = m
    elif s.schedule == "1F1B":
        flight = min(m, p - r)
    else:
        return None
    shared = t if s.sequence_parallel else 1
    if s.recompute:
        return flight * place.layers * tokens * s.hidden * e // shared
    masks = 2 * (s.dropout > 0)
    of_hidden = tokens * s.hidden * (4 * e + masks) // shared + tokens * s.hidden * 12 * e // t
    scores = s.heads * s.sequence * tokens
    of_scores = 0 if s.attention == "sdpa" else scores * (2 * e + 1 if s.dropout > 0 else e) // t
    return flight * place.layers * (of_hidden + of_scores)
