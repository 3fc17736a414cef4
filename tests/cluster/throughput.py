"""How many times the trials an hour two workers manage of what one on one core does, and whether they time the same.

    .venv/bin/python -m tests.cluster.throughput --folder FOLDER --trials 40 --seeds 0 1

Real searches of the digits network, with training in most trials, on two cores on which nothing else runs. Both carry
out the same trials, and neither finds anything done but the training of the uncompressed network.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import optuna

from evaluators.measurement import Measurement
from search.storage import counted, open_storage, spent_s
from search.tracking import Tracker

ROOT = Path(__file__).parents[2]
# Drawn by chance and measured in full, so that what a trial costs does not hang on how many there were before.
OPTIONS = ("sampler=random", "ladder.enabled=false", "compressor.distill.space.epochs.choices=[0,4,8]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    wanted = parser.parse_args()
    wanted.folder.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))[:2]
    # Two virtual cores need not be equally fast.
    alone = statistics.mean(training([core]) for core in cores)
    print(json.dumps({"steps of training alone, two processes over one": round(training(cores) / alone, 3)}))
    gains, both, overlapping = [], 0, 0
    for seed in wanted.seeds:
        # So that no search spends time on the network.
        search(wanted.folder, f"network-{seed}", 1, seed, trials=1)
        found = []
        for workers in (1, 2):
            study = f"workers-{workers}-{seed}"
            trained = wanted.folder / f"network-{seed}-cache/trained"
            shutil.copytree(trained, wanted.folder / f"{study}-cache/trained", dirs_exist_ok=True)
            search(wanted.folder, study, workers, seed, wanted.trials)
            found.append(read(wanted.folder, study))
        (one, of_one), (two, of_two) = found
        shared = of_one.keys() & of_two.keys()
        both += len(shared)
        overlapping += sum(overlap(of_one[digest], of_two[digest]) for digest in shared)
        gains.append(two / one)
        print(json.dumps({"seed": seed, "trials an hour": [round(one), round(two)], "times": round(two / one, 3)}))
    summary = {"times": round(statistics.mean(gains), 3), "least": round(min(gains), 3), "most": round(max(gains), 3)}
    print(json.dumps({**summary, "plans that both measured": both, "bands that overlap": overlapping}))


STEPS = """
import sys, time, torch
from search.models import resnet20
torch.set_num_threads(1)
torch.manual_seed(0)
network, images = resnet20(10, 1), torch.randn(64, 1, 28, 28)
optimizer = torch.optim.SGD(network.parameters(), 1e-3)
began, steps = time.monotonic(), 0
while time.monotonic() - began < float(sys.argv[1]):
    optimizer.zero_grad()
    network(images).square().mean().backward()
    optimizer.step()
    steps += 1
print(steps)
"""


def training(cores: Sequence[int], seconds: float = 15.0) -> int:
    """Steps that as many processes, each on a core of its own, do together: what the machine has to give."""
    started = [
        subprocess.Popen(
            ["taskset", "-c", str(core), sys.executable, "-c", STEPS, str(seconds)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for core in cores
    ]
    return sum(int(process.communicate()[0]) for process in started)


def search(folder: Path, study: str, workers: int, seed: int, trials: int) -> None:
    """As a user would start it, with a cache of its own; a single worker on a single core."""
    cores = sorted(os.sched_getaffinity(0))[:workers]
    options = [f"study={study}", f"workers={workers}", f"seed={seed}", f"folder={folder}/runs", *OPTIONS]
    options += ["budget.minutes=null", f"budget.trials={trials}"]
    environment = {**os.environ, "COMPARETO_CACHE": f"{folder}/{study}-cache", "OMP_NUM_THREADS": "1"}
    with (folder / f"{study}.log").open("w") as log:
        command = ["taskset", "-c", ",".join(map(str, cores)), sys.executable, "-m", "compareto", "search", *options]
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)


def read(folder: Path, study: str) -> tuple[float, dict[str, Measurement]]:
    """Trials in an hour in which at least one worker was at one, and each measured plan's latency."""
    runs = folder / "runs"
    trials = optuna.load_study(study_name=study, storage=open_storage(f"sqlite:///{runs}/optuna.db")).trials
    tracker = Tracker(f"sqlite:///{runs}/mlflow.db", str(runs / "mlartifacts"))
    measured = [record for record in tracker.records(tracker.study(study)) if record.measured]
    return 3600 * len(counted(trials)) / spent_s(trials), {r.plan.digest: r.value("latency_ratio") for r in measured}


def overlap(a: Measurement, b: Measurement) -> bool:
    """Whether the bands have a value in common."""
    return max(a.interval[0], b.interval[0]) <= min(a.interval[1], b.interval[1])


if __name__ == "__main__":
    main()
