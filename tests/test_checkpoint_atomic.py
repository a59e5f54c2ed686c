"""A destination is absent or complete, whatever happens while it is written; and conversion holds little in memory."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron_checkpoints import Form, Model, truth, write

from megatron_kernels import checkpoint
from megatron_kernels.checkpoint import CheckpointError

MODEL = Model(layers=4, vocab=512)
SAVES = {"huggingface": checkpoint.save_huggingface,
         "megatron": lambda *args, **options: checkpoint.save_megatron(*args, tensor_parallel=2, pipeline_parallel=2, **options)}


@pytest.fixture
def source(tmp_path):
    return checkpoint.load(write(tmp_path / "source", Form(), MODEL))


@pytest.fixture(params=SAVES)
def save(request):
    return SAVES[request.param]


def interrupted_at(count, interrupt):
    """A `track` that interrupts after `count` tensors in all."""
    seen = 0

    def track(things):
        nonlocal seen
        for thing in things:
            if seen == count:
                interrupt()
            seen += 1
            yield thing
    return track


def ctrl_c():
    raise KeyboardInterrupt


def same(one, other):
    return one.config == other.config and all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


@pytest.mark.parametrize("count", [0, 1, 20, 40])
def test_ctrl_c(tmp_path, source, save, count):
    with pytest.raises(KeyboardInterrupt):
        save(source, tmp_path / "out" / "model", track=interrupted_at(count, ctrl_c))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("count", [0, 1, 20, 40])
def test_ctrl_c_leaves_what_was_there(tmp_path, source, save, count):
    old = checkpoint.load(write(tmp_path / "source2", Form(), MODEL, truth(MODEL, seed=1)))
    save(old, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        save(source, tmp_path / "out", force=True, track=interrupted_at(count, ctrl_c))
    assert same(checkpoint.load(tmp_path / "out"), old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "source2"]
    save(source, tmp_path / "out", force=True)
    assert same(checkpoint.load(tmp_path / "out"), source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "source2"]


def test_disk_full_at_every_size(tmp_path, source, save):
    """A limit on file sizes fails writes wherever it is met: in a tensor, in torch.save, in a JSON file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    failures = 0
    for limit in [*range(0, 4000, 400), *range(4000, 40_000, 3000), 10**9]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            save(source, tmp_path / "out")
        except CheckpointError as error:
            failures += 1
            assert str(error) == f"{tmp_path / 'out'}: cannot write: File too large"
            assert [path.name for path in tmp_path.iterdir()] == ["source"]
        else:
            break
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failures > 10
    assert same(checkpoint.load(tmp_path / "out"), source)


@pytest.mark.parametrize(("layers", "vocab", "limit"), [(4, 2048, 1000), (4, 2048, 60_000), (1, 16, 8192), (1, 64, 9000)])
def test_no_room_to_unpack(tmp_path, layers, vocab, limit, monkeypatch):
    """Files of a few kilobytes fail when they are closed."""
    archive = write(tmp_path / "source", Form(1.0, "transformer", box="zip"),
                    Model(layers=layers, vocab=vocab, dtype=torch.float16))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match=r"model_optim_rng.pt: cannot unpack into .*scratch/.*: File too large \(TMPDIR"):
            checkpoint.load(archive)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "scratch").iterdir()) == []
    assert checkpoint.load(archive).config.num_layers == layers
    assert list((tmp_path / "scratch").iterdir()) == []


def command_line(*arguments):
    return [sys.executable, "-m", "megatron_kernels.cli", *map(str, arguments)]


def test_full_disk(tmp_path):
    """A real one, of one megabyte: mounted in a namespace of its own, so it needs no rights."""
    mount = tmp_path / "mount"
    mount.mkdir()
    enter = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
             'mount -t tmpfs -o size=1m none "$0" && "$@"; echo "exit $?"; ls -A "$0"', str(mount)]
    if not shutil.which("unshare") or subprocess.run([*enter, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    write(tmp_path, Form(), Model(layers=8, heads=8, head_dim=16, ffn=512, vocab=512))
    for to in SAVES:
        result = subprocess.run([*enter, *command_line("convert", tmp_path, mount / "out", "--to", to)],
                                capture_output=True, text=True)
        assert result.stdout == "exit 1\n", result
        assert result.stderr.splitlines()[-1] == f"error: {mount / 'out'}: cannot write: No space left on device"


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_checkpoint_atomic import SAVES, interrupted_at
from megatron_kernels import checkpoint
SAVES[{kind!r}](checkpoint.load({source!r}), {out!r}, force=True,
                track=interrupted_at({count}, lambda: os.kill(os.getpid(), signal.SIGKILL)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 30])
@pytest.mark.parametrize("kind", SAVES)
@pytest.mark.parametrize("existing", [False, True])
def test_kill(tmp_path, kind, count, existing):
    """A process killed outright leaves no destination, or the old one; and its remains don't hinder the next."""
    write(tmp_path / "source", Form(), MODEL)
    old = checkpoint.load(write(tmp_path / "source2", Form(), MODEL, truth(MODEL, seed=1)))
    if existing:
        SAVES[kind](old, tmp_path / "out")
    script = KILLED.format(tests=str(Path(__file__).parent), kind=kind, source=str(tmp_path / "source"),
                           out=str(tmp_path / "out"), count=count)
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    if existing:
        assert same(checkpoint.load(tmp_path / "out"), old)
    else:
        assert not (tmp_path / "out").exists()
    new = checkpoint.load(tmp_path / "source")
    SAVES[kind](new, tmp_path / "out", force=True)
    assert same(checkpoint.load(tmp_path / "out"), new)


class TestDestination:
    def test_parents_are_made_and_modes_are_usual(self, tmp_path, source, save):
        save(source, tmp_path / "a/b/c")
        (tmp_path / "plain").mkdir()
        assert (tmp_path / "a/b/c").stat().st_mode == (tmp_path / "plain").stat().st_mode

    def test_empty_directory_and_link(self, tmp_path, source, save):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        save(source, tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and same(checkpoint.load(tmp_path / "real"), source)

    @pytest.mark.parametrize(("prepare", "options", "message"), [
        (lambda out: out.write_text("x"), {"force": True}, "exists and is no directory"),
        (lambda out: (out.mkdir(), (out / "notes.txt").write_text("x")), {}, "exists and is not empty; force replaces it"),
        (lambda out: (out.mkdir(), (out / "notes.txt").write_text("x")), {"force": True}, "holds neither config.json nor latest")])
    def test_refused(self, tmp_path, source, save, prepare, options, message):
        prepare(tmp_path / "out")
        with pytest.raises(CheckpointError, match=message):
            save(source, tmp_path / "out", **options)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]

    def test_never_replaces_the_directory_above_its_source(self, tmp_path, source, save):
        with pytest.raises(CheckpointError, match="the destination contains the source"):
            save(source, tmp_path, force=True)
        assert checkpoint.load(tmp_path / "source")

    def test_in_place(self, tmp_path, source, save):
        """The source itself may be replaced: it is read until the new one is complete."""
        expected = {name: tensor.clone() for name, tensor in source.tensors.items()}
        save(source, tmp_path / "source", force=True)
        again = checkpoint.load(tmp_path / "source")
        assert all(torch.equal(again.tensors[name], tensor) for name, tensor in expected.items())

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_no_permission(self, tmp_path, source, save):
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(CheckpointError, match="cannot write: Permission denied"):
            save(source, tmp_path / "locked" / "out")


MEASURED = """
import sys, threading
from megatron_kernels import checkpoint
import safetensors, numpy

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

peak, stop = 0, threading.Event()
def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, anonymous())
        stop.wait(0.001)

before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
source, out, to, tensor_parallel = sys.argv[1:]
opened = checkpoint.load(source)
if to == "huggingface":
    checkpoint.save_huggingface(opened, out)
else:
    checkpoint.save_megatron(opened, out, tensor_parallel=int(tensor_parallel))
stop.set()
watcher.join()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("form", "limit"), [
    (Form(2.0, "transformer", tp=2), 0.5),
    pytest.param(Form(2.0, "transformer", tp=2), 0.4, marks=pytest.mark.slow),
    pytest.param(Form(1.0, "transformer", box="zip"), 0.4, marks=pytest.mark.slow),
    pytest.param(Form(1.0, "transformer", box="zip", legacy=True), 1.2, marks=pytest.mark.slow)])
def test_memory(tmp_path, request, form, limit):
    """Anonymous memory while converting: little more than one tensor where files can be mapped, 1.2 checkpoints elsewhere."""
    large = Model(layers=6, heads=8, head_dim=128, ffn=4096, positions=64, vocab=24_576)
    small = Model(layers=8, heads=8, head_dim=64, ffn=2048, positions=64, vocab=8192)
    model = large if request.node.get_closest_marker("slow") else small
    tensors = truth(model)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size > (200e6 if model is large else 55e6)
    path = write(tmp_path / "source", form, model, tensors)
    del tensors
    hf, megatron = tmp_path / "huggingface", tmp_path / "megatron"
    for source, out, to in ((path, hf, "huggingface"), (path, megatron, "megatron"), (hf, tmp_path / "again", "megatron")):
        result = subprocess.run([sys.executable, "-c", MEASURED, str(source), str(out), to, "2"],
                                capture_output=True, text=True, check=True)
        print(f"{source.name} to {to}: {int(result.stdout) / size:.2f} of {size / 1e6:.0f} MB")
        assert int(result.stdout) < limit * size
