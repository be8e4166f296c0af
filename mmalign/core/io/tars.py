"""Webdataset tars: files that share a name up to its first dot are one sample, such as 0001.jpg, 0001.txt, 0001.json.

Nothing is unpacked to the disk and nothing in an archive is run. Of an uncompressed archive only the headers are read
first; images are read from their place when needed.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mmalign.core.errors import UserError
from mmalign.core.files import is_hidden
from mmalign.core.io.decode import SUFFIXES
from mmalign.core.io.items import MAX_BYTES, Item, Slice, stamp_of
from mmalign.core.io.sidecars import SIDECAR_SUFFIXES
from mmalign.core.io.tables import prompt_column

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
TEXT_SUFFIXES = (*SIDECAR_SUFFIXES, ".json")
MAX_TEXT = 1 << 20


def is_tar(path: Path) -> bool:
    """Tell by its suffix whether a file is a tar."""
    return path.name.lower().endswith(TAR_SUFFIXES)


def tar_items(path: Path, modality: str) -> Iterator[Item]:
    """Yield the images or videos of an archive, named `shard.tar/member`, with the prompt of their sample.

    The prompt is the sample's `.txt` or `.caption`, or else the key prompt, caption or text of its `.json`.

    Raises:
        UserError: the archive is damaged, cut off or holds a name twice, or a prompt is not readable.
    """
    plain = path.name.lower().endswith(".tar")
    try:
        archive = tarfile.open(path, "r:" if plain else "r:*")
        members = [member for member in archive if member.isreg() and not member.issparse()]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: damaged or cut off tar ({error}); fetch it again or leave it out") from None
    members = [member for member in members if not is_hidden(member.name)]
    used = (*SUFFIXES[modality], *TEXT_SUFFIXES)
    counts = Counter(member.name for member in members if Path(member.name).suffix.lower() in used)
    repeated = next((name for name, count in counts.items() if count > 1), None)
    if repeated is not None:
        raise UserError(f"{path}: holds '{repeated}' more than once; write it anew with each name once")
    texts: dict[str, list[tarfile.TarInfo]] = {}
    for member in members:
        if Path(member.name).suffix.lower() in TEXT_SUFFIXES:
            texts.setdefault(_key(member.name), []).append(member)
    stamp = stamp_of(path)
    for member in members:
        if Path(member.name).suffix.lower() in SUFFIXES[modality]:
            media = Slice(path, member.offset_data, member.size) if plain else partial(_read, archive, member)
            prompt = _prompt(archive, member, texts.get(_key(member.name), []), path)
            yield Item(f"{path}/{member.name}", media, prompt, None, stamp)


def _key(name: str) -> str:
    """Return a member's sample: its path up to the first dot of the file's own name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _stem(member: tarfile.TarInfo) -> str:
    return member.name.rpartition(".")[0]


def _prompt(archive: tarfile.TarFile, medium: tarfile.TarInfo, texts: list[tarfile.TarInfo], path: Path) -> str | None:
    """Return the prompt in the texts of a medium's sample that belong to this medium.

    They are those of its own stem (22.05.txt of 22.05.png), else of the longest beginning of it (0001.txt of
    0001.left.png), else those that its stem begins (0001.caption.txt of 0001.png); never 22.06.txt of 22.05.png.
    """
    stem, stems = _stem(medium), {_stem(text) for text in texts}
    above = sorted((other for other in stems if f"{stem}.".startswith(f"{other}.")), key=len, reverse=True)
    below = sorted(other for other in stems if other.startswith(f"{stem}."))
    for group in (*([other] for other in above), below):
        found: dict[str, str] = {}
        for text in sorted(texts, key=lambda text: text.name.lower().endswith(".json")):
            if _stem(text) in group and not (found and text.name.lower().endswith(".json")):
                prompt = _read_prompt(archive, text, f"{path}/{text.name}")
                found |= {} if prompt is None else {text.name: prompt}
        if len(set(found.values())) > 1:
            raise UserError(f"{path}: '{medium.name}' has several prompts ({', '.join(found)}); keep one")
        if found:
            return next(iter(found.values()))
    return None


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_BYTES:
        raise OSError(f"claims to hold {member.size} bytes")
    file = archive.extractfile(member)
    return file.read() if file is not None else b""


def _read_prompt(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> str | None:
    if member.size > MAX_TEXT:
        raise UserError(f"{name}: {member.size} bytes are too many for a prompt")
    try:
        text = _read(archive, member).decode("utf-8-sig")
        if member.name.lower().endswith(SIDECAR_SUFFIXES):
            return text.strip()
        content = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{name}: not readable as a prompt ({error})") from None
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{name}: cut off ({error})") from None
    key = prompt_column(content) if isinstance(content, dict) else None
    return content[key] if key is not None and isinstance(content[key], str) else None
