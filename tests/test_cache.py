"""What candidates have in common, on disk: what comes back, what is removed, and what several processes do to it."""

import fcntl
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from compressors.pipeline import Applied, FloatModel, LayerNumbers
from evaluators.export import once
from search.cache import Cache
from tests.zoo import NETS, build, images

ACHIEVED = {"distill": {"": {"epochs": 4, "loss": 0.25}}}


@pytest.mark.parametrize("net", NETS)
def test_weights_and_what_was_achieved_come_back(net: str, tmp_path: Path) -> None:
    store, trained, empty = Cache(tmp_path), build(net, seed=1), build(net, seed=2)
    store.save("abc", trained, ACHIEVED)
    assert store.load("abc", empty) == ACHIEVED
    assert torch.equal(empty(images()), trained(images()))


def test_tied_layers_stay_tied(tmp_path: Path) -> None:
    store, net = Cache(tmp_path), build("tied")
    store.save("abc", build("tied", seed=1), {})
    store.load("abc", net)
    assert net.get_submodule("first").weight is net.get_submodule("second").weight


def test_what_was_never_stored_is_none_and_leaves_the_model_alone(tmp_path: Path) -> None:
    net = build("plain")
    before = net(images())
    assert Cache(tmp_path).load("abc", net) is None
    assert torch.equal(net(images()), before)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_torn_file_is_thrown_away_and_can_be_written_again(share: float, tmp_path: Path) -> None:
    store, net = Cache(tmp_path), build("plain")
    store.save("abc", net, ACHIEVED)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert store.load("abc", net) is None
    assert not path.exists()
    store.save("abc", net, ACHIEVED)
    assert store.load("abc", net) == ACHIEVED


def test_weights_of_another_shape_are_thrown_away_before_any_is_loaded(tmp_path: Path) -> None:
    store, net = Cache(tmp_path), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    store.save("abc", nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)), ACHIEVED)
    before = [parameter.clone() for parameter in net.parameters()]
    assert store.load("abc", net) is None
    assert all(map(torch.equal, net.parameters(), before))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_saving_leaves_one_file_and_nothing_half_written(tmp_path: Path) -> None:
    store = Cache(tmp_path)
    for _ in range(2):
        store.save("abc", build("plain"), ACHIEVED)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["used", "weights.safetensors"]


def test_prefixes_do_not_mix(tmp_path: Path) -> None:
    store, net = Cache(tmp_path), build("plain")
    store.save("a", build("plain", 1), {"a": {}})
    store.save("b", build("plain", 2), {"b": {}})
    assert store.load("a", net) == {"a": {}}
    assert torch.equal(net(images()), build("plain", 1)(images()))


VALUES = torch.arange(-8, 8, dtype=torch.int8).reshape(2, 8)
NUMBERS = Applied(
    {"head": {"bits": 4, "relative_error": 0.1}},
    {
        "head": LayerNumbers(4, VALUES, torch.tensor([[0.1], [0.2]]), 8),
        "twin": LayerNumbers(4, VALUES, torch.ones(2, 2), 4, torch.zeros(2, 2)),
        "plain": LayerNumbers(8),
        "table": LayerNumbers(8, VALUES.to(torch.uint8), codebook=torch.linspace(-1, 1, 200)),
        "fitted": LayerNumbers(
            8,
            VALUES,
            torch.ones(2, 1),
            shift=torch.ones(2),
            calibration="mse",
            per_channel=True,
            symmetric=True,
        ),
    },
)


def test_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    Cache(tmp_path).save_numbers("abc", "key", NUMBERS)
    found = Cache(tmp_path).load_numbers("abc", "key")
    assert found is not None
    assert found.achieved == NUMBERS.achieved
    assert found.numbers.keys() == NUMBERS.numbers.keys()
    for layer, numbers in found.numbers.items():
        wanted = NUMBERS.numbers[layer]
        plain, expected = ({k: v for k, v in vars(n).items() if k not in n.tensors()} for n in (numbers, wanted))
        assert plain == expected
        assert numbers.tensors().keys() == wanted.tensors().keys()
        assert all(torch.equal(value, wanted.tensors()[name]) for name, value in numbers.tensors().items())
        assert all(value.dtype == wanted.tensors()[name].dtype for name, value in numbers.tensors().items())


def test_numbers_have_one_place_each(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.save_numbers("abc", "key", NUMBERS)
    assert cache.load_numbers("abc", "other") is None
    assert cache.load_numbers("abd", "key") is None


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_torn_numbers_are_thrown_away(share: float, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.save_numbers("abc", "key", NUMBERS)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert cache.load_numbers("abc", "key") is None
    cache.save_numbers("abc", "key", NUMBERS)
    assert cache.load_numbers("abc", "key") is not None


def test_the_last_two_float_models_stay_in_memory(tmp_path: Path) -> None:
    cache, models = Cache(tmp_path), [FloatModel(nn.Identity(), {}) for _ in range(3)]
    for name, model in zip("abc", models, strict=True):
        cache.remember(name, model)
    assert cache.recall("a") is None
    assert cache.recall("b") is models[1]
    assert cache.recall("c") is models[2]


KB = 1000
STUDY, OTHER = "0123456789abcdef", "fedcba9876543210"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Room for two entries and a bit."""
    return Cache(tmp_path / STUDY, limit_bytes=2.5 * KB)


def fill(cache: Cache, entry: str, last_use: float, study: str = STUDY, size: int = KB) -> Path:
    """An entry that was last used so many seconds after the epoch."""
    folder = cache.folder.parent / study / entry
    folder.mkdir(parents=True)
    (folder / "graph").mkdir()
    (folder / "graph" / "float.onnx").write_bytes(bytes(size))
    (folder / "used").touch()
    os.utime(folder / "used", (last_use, last_use))
    return folder


def left(cache: Cache) -> set[str]:
    return {entry.name for entry in cache.folder.parent.glob("*/*/") if (entry / "graph").exists()}


def test_what_was_unused_for_longest_goes_first_from_all_studies(cache: Cache) -> None:
    fill(cache, "young", 40)
    fill(cache, "oldest", 10, OTHER)
    fill(cache, "middle", 30, OTHER)
    fill(cache, "old", 20)
    cache.shrink()
    assert left(cache) == {"young", "middle"}
    assert not (cache.folder / "old").exists()


def test_within_the_bound_nothing_goes(cache: Cache) -> None:
    fill(cache, "a", 10)
    fill(cache, "b", 20)
    cache.shrink()
    assert left(cache) == {"a", "b"}


def test_without_a_bound_nothing_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path / STUDY)
    fill(cache, "a", 10, size=10**7)
    cache.shrink()
    assert left(cache) == {"a"}


def test_using_an_entry_makes_it_the_youngest(cache: Cache) -> None:
    for last_use, name in enumerate(("a", "b", "c"), start=10):
        fill(cache, name, last_use)
    with cache.in_use("a"):
        pass
    assert left(cache) == {"a", "c"}


def test_looking_up_counts_as_a_use(cache: Cache) -> None:
    for last_use, name in enumerate(("a", "b", "c"), start=10):
        fill(cache, name, last_use)
    (cache.folder / "a" / "weights.safetensors").touch()
    cache.load("a", build("plain"))
    cache.shrink()
    assert left(cache) == {"a", "c"}


def test_an_entry_that_was_never_held_is_as_old_as_its_folder(cache: Cache) -> None:
    for last_use, name in enumerate(("a", "b", "c"), start=10):
        folder = fill(cache, name, last_use)
        (folder / "used").unlink()
        os.utime(folder, (last_use, last_use))
    cache.shrink()
    assert left(cache) == {"b", "c"}


def test_what_an_entry_grew_by_counts(cache: Cache) -> None:
    fill(cache, "a", 10)
    fill(cache, "b", 20)
    cache.shrink()
    with cache.in_use("b"):
        (cache.folder / "b" / "more").write_bytes(bytes(KB))
    assert left(cache) == {"b"}


def test_networks_data_and_whatever_else_lies_beside_the_studies_stays(cache: Cache) -> None:
    for name in ("trained", "data", "notes"):
        fill(cache, "x", 1, study=name, size=10 * KB)
    fill(cache, "a", 10, size=10 * KB)
    cache.shrink()
    assert {path.parent.name for path in cache.folder.parent.glob("*/x")} == {"trained", "data", "notes"}
    assert not (cache.folder / "a").exists()


def test_what_is_kept_stays_until_it_is_let_go(cache: Cache) -> None:
    fill(cache, "reference", 1, size=10 * KB)
    cache.keep("reference")
    Cache(cache.folder, 1).shrink()
    assert left(cache) == {"reference"}
    cache.close()
    Cache(cache.folder, 1).shrink()
    assert left(cache) == set()


def test_an_entry_in_use_stays_however_old(cache: Cache) -> None:
    fill(cache, "a", 1, size=10 * KB)
    fill(cache, "b", 2)
    with cache.in_use("a"):
        Cache(cache.folder, 1).shrink()
        assert left(cache) == {"a"}


def test_a_vanished_entry_is_made_again(cache: Cache) -> None:
    cache.save("abc", build("plain"), ACHIEVED)
    shutil.rmtree(cache.folder.parent)
    assert cache.load("abc", build("plain")) is None
    with cache.in_use("abc"):
        assert (cache.folder / "abc").is_dir()
    cache.save("abc", build("plain"), ACHIEVED)
    assert cache.load("abc", build("plain")) == ACHIEVED


def test_what_a_dead_process_was_removing_goes_too(cache: Cache) -> None:
    fill(cache, "half", 1, study="removed")
    cache.shrink()
    assert not (cache.folder.parent / "removed").exists()


@contextmanager
def another(program: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    """A process of its own; it has begun when it has printed a line."""
    lines = f"import sys, time\nfrom pathlib import Path\n{program}"
    command = [sys.executable, "-c", lines, *map(str, words)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        try:
            yield process
        finally:
            process.kill()


HOLD = """
from search.cache import Cache
with Cache(Path(sys.argv[1])).in_use("a"):
    print("begun", flush=True)
    time.sleep(600)
"""


def test_another_process_holds_what_it_uses_until_it_is_killed(cache: Cache) -> None:
    fill(cache, "a", 1, size=10 * KB)
    with another(HOLD, cache.folder) as holder:
        cache.shrink()
        assert left(cache) == {"a"}
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        cache.shrink()
        assert left(cache) == set()


def test_who_waited_while_the_entry_was_removed_gets_a_new_one(cache: Cache) -> None:
    entry = fill(cache, "a", 1)
    found: list[bool] = []

    def use() -> None:
        with cache.in_use("a"):
            found.append((cache.folder / "a").is_dir())

    waiting = threading.Thread(target=use)
    with (entry / "used").open("a+") as remover:
        fcntl.flock(remover, fcntl.LOCK_EX)
        waiting.start()
        waiting.join(0.2)
        assert found == []
        entry.rename(cache.folder.parent / "gone")
    waiting.join()
    assert found == [True]


SHRINK = """
import fcntl
with (Path(sys.argv[1]) / "shrinking").open("a+") as turn:
    fcntl.flock(turn, fcntl.LOCK_EX)
    print("begun", flush=True)
    time.sleep(600)
"""


def test_one_process_at_a_time_removes_and_others_do_not_wait(cache: Cache) -> None:
    fill(cache, "a", 1, size=10 * KB)
    with another(SHRINK, cache.folder.parent):
        cache.shrink()
        assert left(cache) == {"a"}
    cache.shrink()
    assert left(cache) == set()


PAYLOAD = bytes(range(256)) * 8


def work(root: str, number: int, rounds: int) -> None:
    """Use entries in turn, as trials do, with room for hardly one: whatever is looked at must be whole."""
    cache = Cache(Path(root) / (STUDY, OTHER)[number % 2], limit_bytes=3 * KB)
    net = build("plain")
    for turn in range(rounds):
        entry = f"entry-{(turn * (number + 1)) % 3}"
        with cache.in_use(entry):
            target = once(cache.folder / entry / "graph", lambda path: _slowly(path))
            cache.save(entry, net, ACHIEVED)
            assert cache.load(entry, net) == ACHIEVED
            time.sleep(0.001)
            assert (target / "float.onnx").read_bytes() == PAYLOAD


def _slowly(path: Path) -> None:
    path.mkdir()
    with (path / "float.onnx").open("wb") as handle:
        for begin in range(0, len(PAYLOAD), 512):
            handle.write(PAYLOAD[begin : begin + 512])
            handle.flush()


def test_processes_that_remove_each_others_entries_never_miss_what_they_use(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(str(tmp_path), number, 40)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    Cache(tmp_path / STUDY, 3 * KB).shrink()
    entries = [path for path in tmp_path.glob("*/entry-*") if path.is_dir()]
    assert sum(path.stat().st_size for entry in entries for path in entry.rglob("*") if path.is_file()) <= 3 * KB
