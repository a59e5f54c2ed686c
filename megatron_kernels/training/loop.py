"""The training loop.

Every iteration: the learning rate, forward and backward of one global batch, the norm of all gradients, the update, a row for the
logs. What the run is made of is elsewhere: `tokens.py` and `data.py` (what is trained on), `trainee.py` (the model on its ranks),
`schedule.py` (learning rate, decay groups, loss scale), `logs.py`, `stopping.py` (signals).
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .. import checkpoint, parallel
from ..checkpoint.together import ranks_of
from .data import Samples
from .logs import Log, Row, summary_writer
from .options import DType, Options
from .prepare import check_fit, find_samples, find_tokenizer, identity, in_vocabulary, make_mesh
from .schedule import LossScale, learning_rate
from .stopping import Stop
from .trainee import Trainee, batches_of, config_of


class TrainingError(ValueError):
    """Training that can't go on."""


@dataclass
class Progress:
    """What a run is at, beside weights, optimizer and random states: all of it is in each checkpoint."""

    identity: dict[str, Any]  # what must not change between two parts of a run, or the order of the samples would
    iteration: int = 0  # done so far
    skipped: int = 0  # of these, those that left the weights alone
    elapsed: float = 0.0  # seconds
    scale: LossScale = field(default_factory=LossScale)


def run(options: Options) -> int:
    """Train as the options say. Returns 0, or 128 + the number of the signal that ended the run early, after it was saved.

    Under torchrun every rank calls this. Raises ValueError for what can't be, TrainingError when the loss is no longer finite,
    parallel.CollectiveError when another rank has stopped.
    """
    options.check()
    if options.tensorboard is not None:
        summary_writer()
    own = not dist.is_initialized()
    mesh = make_mesh(options)
    with parallel.failures(mesh):
        code = _train(options, mesh)
    if mesh is not None and own:
        dist.destroy_process_group()
    return code


def _train(options: Options, mesh: DeviceMesh | None) -> int:
    tokenizer = find_tokenizer(options)
    samples, scored = find_samples(options, tokenizer, mesh)
    source = None if options.model is None else checkpoint.load(options.model, options.config)
    config = config_of(options, source, samples.tokens, tokenizer)
    batches = batches_of(options, parallel.group_of(mesh, "dp"))
    check_fit(options, config, samples, scored, batches.global_batch, tokenizer)

    trainee = Trainee(options, config, source, batches, mesh)
    progress = Progress(identity(options, samples, batches.global_batch))
    first = mesh is None or dist.get_rank() == 0
    notes = _resume(options, trainee, progress) if options.resume else []
    with Log(options.iterations, options.log_interval, options.log_csv, options.tensorboard, progress.iteration,
             quiet=not first) as log:
        for text in (trainee.described(samples), *notes):
            log.say(text)
        with Stop() as stop:
            ended = _loop(options, trainee, samples, scored, progress, log, stop)
        if ended:
            saved = "saved" if options.save else "not saved, for want of --save"
            log.say(f"{signal.Signals(ended).name}: stopped after iteration {progress.iteration}, {saved}")
            return 128 + ended
        for path in trainee.export(tokenizer):
            log.say(f"wrote {path}")
    return 0


def _loop(options: Options, trainee: Trainee, samples: Samples, scored: Samples | None, progress: Progress, log: Log,
          stop: Stop) -> int:
    """Until the last iteration, or a signal, whose number is returned."""
    batches, fp16 = trainee.batches, options.dtype is DType.float16
    tokens = batches.global_batch * options.seq_length
    while progress.iteration < options.iterations:
        start = time.perf_counter()
        pieces = in_vocabulary([samples[positions] for positions in batches.positions(progress.iteration)],
                               trainee.config.vocab_size)
        lr = learning_rate(options, progress.iteration - progress.skipped)
        for group in trainee.optimizer.param_groups:
            group["lr"] = lr
        scale = progress.scale.value if fp16 else 1.0

        own_loss = trainee.forward_backward(pieces, scale)
        norm = trainee.clip(scale)  # over all ranks: what is decided by it they decide alike
        total, *signalled = trainee.together(own_loss.item(), *(stop.signal == number for number in Stop.SIGNALS))
        loss = total / trainee.ranks
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            trainee.optimizer.step()
        elif not fp16:
            raise TrainingError(f"iteration {progress.iteration + 1}: the loss is {loss} and the norm of the gradients {norm}; the "
                                "weights were not changed" + (f", {options.save} has earlier ones" if options.save else ""))
        progress.iteration += 1
        if fp16:
            progress.skipped += not finite
            try:
                progress.scale.update(finite)
            except ArithmeticError as error:
                raise TrainingError(f"iteration {progress.iteration}: {error}") from None
        seconds = time.perf_counter() - start
        progress.elapsed += seconds

        row = Row(progress.iteration, loss, lr, norm, scale, int(not finite), tokens / seconds, progress.elapsed)
        last = progress.iteration == options.iterations
        ended = next((number for number, ranks in zip(Stop.SIGNALS, signalled, strict=True) if ranks), 0)
        if scored is not None and (last or progress.iteration % options.eval_interval == 0):
            row.valid_loss = _score(trainee, scored, options.eval_batches)
        log.row(row)
        if options.save and (last or ended or (options.save_interval and progress.iteration % options.save_interval == 0)):
            _save(options, trainee, progress, log)
        if ended and not last:
            return ended
    return 0


def _score(trainee: Trainee, scored: Samples, most: int) -> float:
    """The mean loss of the first global batches of the samples kept for this."""
    count = min(most, scored.count // trainee.batches.global_batch)
    losses = [trainee.evaluate([scored[positions] for positions in trainee.batches.positions(number)]).item()
              for number in range(count)]
    total, = trainee.together(sum(losses) / count)
    return total / trainee.ranks


def _save(options: Options, trainee: Trainee, progress: Progress, log: Log) -> None:
    """A checkpoint, whole or not at all; then those that are no longer wanted go."""
    assert options.save is not None
    log.sync()
    checkpoint.save_training(options.save, trainee.models, trainee.optimizer, step=progress.iteration, extra=asdict(progress),
                             mesh=trainee.mesh)
    if options.keep and not log.quiet:
        steps = sorted(path for path in options.save.glob("step_*") if path.is_dir())
        for path in steps[:-options.keep]:
            hidden = path.with_name(f".{path.name}.tmp-old")  # a name that the next save clears, should this one be killed
            os.rename(path, hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def _resume(options: Options, trainee: Trainee, progress: Progress) -> list[str]:
    """Weights, optimizer, random states and progress of the last checkpoint, where there is one; what a user should know of it."""
    directory = options.save
    assert directory is not None
    with ranks_of(trainee.mesh) as ranks:
        path = ranks.first(lambda: checkpoint.latest(directory))
    if path is None:
        return []
    restored = checkpoint.load_training(path, trainee.models, trainee.optimizer, mesh=trainee.mesh)
    saved = restored.extra
    if not isinstance(saved, dict) or saved.keys() != asdict(progress).keys():
        raise ValueError(f"{path}: not a checkpoint of this command; export it as a model, and start from that with --model")
    for name, value in progress.identity.items():
        if saved["identity"][name] != value:
            raise ValueError(f"{path}: was trained with {name} {saved['identity'][name]}, got {value}: the order of the samples "
                             "would change; start a new run from an exported model")
    progress.iteration, progress.skipped, progress.elapsed = saved["iteration"], saved["skipped"], saved["elapsed"]
    progress.scale = LossScale(**saved["scale"])
    if not restored.random:  # another parallel layout
        trainee.seed(options.seed + progress.iteration)
    for group, decay in zip(trainee.optimizer.param_groups, (options.weight_decay, 0.0), strict=True):
        group.update(weight_decay=decay, betas=(options.beta1, options.beta2), eps=options.eps)
    dropout = [] if restored.random else ["note: saved in another parallel layout; dropout is seeded anew"]
    return [f"resumed at iteration {progress.iteration} from {path}", *dropout]
