# SPDX-License-Identifier: Apache-2.0
"""Official weights and COCO, from where their authors publish them.

Nothing is mirrored: an address is that of the authors' README or hub file. Checksums are compared where somebody has
published one: the start of the SHA-256 in the file names of PyTorch's and DeiT's files, SHA-1 of GluonCV for COCO.
"""

import hashlib
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ._errors import UserError

_CHUNK = 1 << 20
_TIMEOUT_S = 30
_SWAG = "https://dl.fbaipublicfiles.com/SWAG/"
_DEIT = "https://dl.fbaipublicfiles.com/deit/"
_TORCH = "https://download.pytorch.org/models/"
_LVVIT = "https://github.com/zihangJiang/TokenLabeling/releases/download/1.0/"
_DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
_COCO = "http://images.cocodataset.org/"


@dataclass(frozen=True)
class Item:
    """A file that can be fetched.

    Attributes:
        name: what the user types.
        url: where it lies.
        what: in words.
        models: names of models that take it, and what belongs to it.
        file: its name on disk.
        checksum: ``"sha256:..."`` or ``"sha1:..."``, the start is enough; None: none was published.
    """

    name: str
    url: str
    what: str
    models: str
    file: str
    checksum: str | None = None

    @property
    def page(self) -> str:
        """The address for a browser."""
        if self.url.startswith(_DRIVE):
            return f"https://drive.google.com/file/d/{self.url.removeprefix(_DRIVE)}/view"
        return self.url


def _hashed(name, base, file, what, models):
    """A file of PyTorch's or DeiT's, whose name ends in the first eight digits of its SHA-256."""
    digits = file.rpartition(".")[0].rpartition("-")[2]
    return Item(name, base + file, what, models, file, f"sha256:{digits}")


def _items():
    for size in ("b16", "l16", "h14"):
        kinds = (
            ""
            if size == "b16"
            else ", hourglass_vit_*, tome_vit_*, e_vit_*, evo_vit_*, ats_vit_*, act_vit_*, smyrf_vit_*"
        )
        for name, models in ((f"vit_{size}", f"vit_{size}"), (f"vit_{size}_in1k", f"vit_{size}_in1k{kinds}")):
            yield Item(name, f"{_SWAG}{name}.torch", "SWAG", models, f"{name}.torch")
    for size, file in (
        ("b_16", "vit_b_16_swag-9ac1b537.pth"),
        ("l_16", "vit_l_16_swag-4f3808c9.pth"),
        ("h_14", "vit_h_14_swag-80465313.pth"),
    ):
        models = f"vit_{size.replace('_', '')}_in1k and its methods"
        yield _hashed(f"torchvision_vit_{size}_swag", _TORCH, file, "SWAG, as torchvision names it", models)
    for name, digits in (
        ("deit_tiny_patch16_224", "a1311bcf"),
        ("deit_small_patch16_224", "cd65a155"),
        ("deit_base_patch16_224", "b5f2ef4d"),
        ("deit_tiny_distilled_patch16_224", "b40b3cf7"),
        ("deit_small_distilled_patch16_224", "649709d9"),
        ("deit_base_distilled_patch16_224", "df68dfff"),
        ("deit_base_patch16_384", "8de9b5d1"),
        ("deit_base_distilled_patch16_384", "d0272ac0"),
    ):
        yield _hashed(name, _DEIT, f"{name}-{digits}.pth", "DeiT", f"{name}, any method")
    for name, file in (
        ("lvvit_s", "lvvit_s-26M-224-83.3.pth.tar"),
        ("lvvit_m", "lvvit_m-56M-224-84.0.pth.tar"),
        ("lvvit_s_384", "lvvit_s-26M-384-84.4.pth.tar"),
        ("lvvit_m_384", "lvvit_m-56M-384-85.4.pth.tar"),
    ):
        yield Item(name, _LVVIT + file, "LV-ViT", f"dynamicvit_{name[:7]}, spvit_{name[:7]} (to train from)", file)
    for name, model, key in (
        ("dynamicvit_deit_256_0.7", "dynamicvit_deit_256", "1fpdTNRZtGOW25UwOadj1iUdjqmu88WkO"),
        ("dynamicvit_deit_s_0.7", "dynamicvit_deit_s", "1H5kHHagdqo4emk9CgjfA7DA62XJr8Yc1"),
        ("dynamicvit_lvvit_s_0.5", "dynamicvit_lvvit_s -o keep=0.5", "1kPe3MhtYHNdG7natrU20xcAqodO6-Z58"),
        ("dynamicvit_lvvit_s_0.7", "dynamicvit_lvvit_s", "1dNloEsuEiTi592SdM_ELC36kOJ7aaF-3"),
        ("dynamicvit_lvvit_m_0.7", "dynamicvit_lvvit_m", "1dNab1B5ZOTVNpnpO6H1TsXKFM8BAlA3I"),
    ):
        yield Item(name, _DRIVE + key, "DynamicViT", model, f"{name}.pth")
    for fused, keys in (
        ("fused", _EVIT_FUSED),
        ("plain", _EVIT_PLAIN),
    ):
        for keep, key in keys.items():
            name = f"evit_deit_s_{fused}_{keep}"
            given = f"-o keep={keep}" + (" -o fuse_token=false" if fused == "plain" else "")
            yield Item(name, _DRIVE + key, "EViT", f"deit_small_patch16_shrink_base {given}", f"{name}.pth")
    for name, path, digits in (
        ("coco-val2017", "zips/val2017.zip", "4950dc9d00dbe1c933ee0170f5797584351d2a41"),
        ("coco-train2017", "zips/train2017.zip", "10ad623668ab00c62c096f0ed636d6aff41faca5"),
        ("coco-annotations", "annotations/annotations_trainval2017.zip", "8551ee4bb5860311e79dace7e79cb91e432e78b3"),
    ):
        yield Item(name, _COCO + path, "COCO 2017", "data", path.rpartition("/")[2], f"sha1:{digits}")


_EVIT_FUSED = {
    0.9: "1CmROmlLV-7nyYY-Bhph8_5ut3wFwqvny",
    0.8: "1BTJyIe0zVK3zYXz3BzIlSC4YZCnZu7cJ",
    0.7: "1FfvdEBss9f8gexjqEY8vOSUQe_8qwYuL",
    0.6: "1D1m067jDbyG0g2UjyBMaJ4NTT2Ad8vrv",
    0.5: "1-nyxAlRWjD2icbgj3Y3YWcCmYj9sTgfD",
}
_EVIT_PLAIN = {
    0.9: "1tSaPLged8ED2RTiN5ttSmeTNIw1aNNwV",
    0.8: "1zdFbHk-gOw_Wiid5_Z8NFcBa1HMI-JF-",
    0.7: "1VCZGphW34rFWZDXOoF7XO4EJfRLZ-YB8",
    0.6: "1okYcKryyD6FFPG9v5r40R28SRNfVZ5X0",
    0.5: "1qsPeLN5ytLO8pM7lUuj5bi6pyMhjiSJO",
}
# Asked for, and not to be had: why, and what to do.
_ABSENT = {
    "imagenet": "ImageNet needs an account at https://image-net.org: fetch ILSVRC2012 there; the validation images must lie "
    "in one folder per class",
    "spvit": "no SPViT weights were ever published: train from deit_small_patch16_224 or lvvit_s",
    "svit": "no weights of SViT's classification models were published: train from deit_small_patch16_224",
}


# One name for several files.
_SETS = {"coco": ("coco-val2017", "coco-train2017", "coco-annotations")}


def items() -> dict[str, Item]:
    """Everything that can be fetched, by name."""
    return {item.name: item for item in _items()}


def find(name: str) -> list[Item]:
    """The items of a name (``coco`` stands for three).

    Raises:
        UserError: unknown, or not to be had.
    """
    known = items()
    if name in known or name in _SETS:
        return [known[part] for part in _SETS.get(name, (name,))]
    if name.lower() in _ABSENT:
        raise UserError(_ABSENT[name.lower()])
    import difflib

    close = difflib.get_close_matches(name, [*known, *_SETS], 3)
    hint = f"did you mean {', '.join(close)}?" if close else "see tokenprune download --list"
    raise UserError(f"there is nothing to download under the name {name!r} ({hint})")


def download(
    item: Item, folder: str | Path = "downloads", *, progress: Callable[[int, int | None], None] | None = None
) -> Path:
    """Fetch a file; what an interrupted download has left (``FILE.part``) is continued.

    Args:
        item: see :func:`find`.
        folder: made when missing. A complete file in it is checked and kept.
        progress: called with ``(bytes so far, bytes in total or None)``.

    Returns:
        Path of the file.

    Raises:
        UserError: no network, a wrong checksum, or a folder that cannot be written.
    """
    path = Path(folder) / item.file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            _verify(item, path)
            return path
        part = path.with_name(path.name + ".part")
        _fetch(item, part, progress)
        _verify(item, part)
        part.replace(path)
    except urllib.error.HTTPError as error:
        raise UserError(f"{item.page} cannot be fetched: the server says {error.code} {error.reason}") from None
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{item.page} cannot be reached from here ({reason}): fetch it where the network allows and put it at {path}"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def _fetch(item, part, progress):
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(item.url, headers={"User-Agent": "tokenprune"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing is left to send
            return
        raise
    with answer:
        if "text/html" in answer.headers.get("Content-Type", ""):
            raise UserError(f"{item.page} answers with a web page, not with the file: fetch it with a browser")
        if have and answer.status != 206:  # the server starts again
            have = 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        with open(part, "ab" if have else "wb") as file:
            _check_space(part, have, total)
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                if progress is not None:
                    progress(have, total)
    if total is not None and have < total:
        raise UserError(f"{item.page} broke off after {have} of {total} bytes: call again to continue")


def _check_space(part, have, total):
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - have > free:
        raise UserError(f"{part.parent} has {free / 1e9:.1f} GB free, and {(total - have) / 1e9:.1f} GB are to come")


def _verify(item, path):
    if item.checksum is None:
        return
    kind, _, wanted = item.checksum.partition(":")
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if not digest.hexdigest().startswith(wanted):
        broken = path.with_name(path.name + ".broken")
        path.replace(broken)
        raise UserError(
            f"{path.name} has the {kind} {digest.hexdigest()[: len(wanted)]}, and {wanted} was published: put aside as "
            f"{broken.name}"
        )


def host(item: Item) -> str:
    """The server of an item."""
    return urlsplit(item.page).hostname or ""
