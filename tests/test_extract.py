"""The program in a reply: compared with a CommonMark parser, and as models really write."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlrf import Segment
from rlrf_environments.code.extract import _LINE, Attempt, _blocks, extract, missing_entry

# --- CommonMark -------------------------------------------------------------------------------

# Lines that an item of a list may not reach are left out: there markdown-it is at odds with the
# specification (of a lazy line it forgets which item it goes on with).
TEXT = st.sampled_from(["x = 1", "def f():", "    return 1", "Words.", "", "", "    code", "\tx"])
STRUCTURE = st.sampled_from(
    ["# h", "---", "===", "- - -", "- item", "* a", "-", "1. one", "2. two", "> q", ">", "-     x"]
)
FENCE = st.builds(
    lambda indent, fence, info: " " * indent + fence + info,
    st.integers(0, 3),
    st.sampled_from(["```", "````", "~~~", "~~~~~"]),
    st.sampled_from(["", "", "python", " py x", "a`b", "  "]),
)
DEEP_FENCE = FENCE.map(lambda line: "    " + line)


def _written(opening: str, body: list[str], longer: str, indent: int) -> list[str]:
    bare = opening.strip()
    run = bare[: len(bare) - len(bare.lstrip(bare[0]))]
    return [opening, *body, " " * indent + run + bare[0] * len(longer)]


BLOCK = st.builds(
    _written,
    FENCE,
    st.lists(st.one_of(TEXT, FENCE, DEEP_FENCE, STRUCTURE), max_size=5),
    st.sampled_from(["", "", "x", "xx"]),
    st.integers(0, 3),
)
REPLY = st.lists(st.one_of(BLOCK, st.one_of(TEXT, STRUCTURE).map(lambda s: [s])), max_size=5).map(
    lambda parts: [line for part in parts for line in part]
)


def _within(container: str, lines: list[str]) -> list[str]:
    if container == ">":
        return ["> " + line for line in lines]
    indent = " " * len(container)
    return [(indent if i else container) + line for i, line in enumerate(lines)]


def by_commonmark(text: str, lines: list[str]) -> list[tuple[str, str]] | None:
    """Info and content of the fenced blocks; None where one is not ended by a fence."""
    from markdown_it import MarkdownIt

    # A reply may be wrapped in <answer>, so HTML is text here; link definitions are, too.
    found = []
    for token in MarkdownIt("commonmark").disable(["html_block", "reference"]).parse(text):
        if token.type == "fence":
            first, last = token.map
            closed = token.content.count("\n") == last - first - 2
            if not closed or not lines[last - 1].rstrip().endswith(token.markup[:3]):
                return None
            found.append((token.info.strip(), token.content))
    return found


REPLIES = given(
    REPLY, st.lists(st.sampled_from([">", "- ", "1. "]), max_size=2), st.sampled_from("\n\r")
)


def agrees_with_commonmark(lines, containers, end):
    pytest.importorskip("markdown_it", reason="the parser to compare with comes with rich")
    for container in containers:
        lines = _within(container, lines)
    text = "".join(line + end for line in lines)
    # A tab behind "> > " is four columns by the specification; markdown-it takes it for two.
    assume(containers.count(">") < 2 or "\t" not in text)
    wanted = by_commonmark(text, lines)
    assume(wanted)
    ours, opened = _blocks(_LINE.findall(text))
    assert [(b.info, b.code.replace(end, "\n")) for b in ours] == wanted
    assert opened is None


@settings(max_examples=80, derandomize=True, deadline=None)
@REPLIES
def test_blocks_are_those_of_commonmark(lines, containers, end):
    agrees_with_commonmark(lines, containers, end)


@pytest.mark.slow
@settings(max_examples=600, derandomize=True, deadline=None)
@REPLIES
def test_blocks_of_many_replies_are_those_of_commonmark(lines, containers, end):
    agrees_with_commonmark(lines, containers, end)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(REPLY, st.sampled_from(["", "> ", "1. "]))
def test_every_line_of_a_program_is_where_it_says(lines, container):
    text = "".join(container + line + "\n" for line in lines)
    attempt = extract(text)
    if isinstance(attempt, Segment):
        return
    for number in range(1, attempt.code.count("\n") + 2):
        line = attempt.line(number)
        if line is not None and line.strip():
            assert text[slice(*attempt.line_span(number))] == line.strip()


# --- as models write --------------------------------------------------------------------------

PROGRAM = "def f(x):\n    return x + 1\n"


def program(reply: str, entry: str | None = None) -> str:
    found = extract(reply, entry=entry)
    assert isinstance(found, Attempt), found
    return found.code


@pytest.mark.parametrize(
    "ending",
    [
        "```</answer>",
        "``` That is all.",
        "```<|im_end|>",
        "```.",
        "``` (done)",
        "````",
        "```   ",
        "``` # end",
        "   ```</answer>",
        "```\u200b",
        "```**Explanation**: it adds one.",
        "```</answer>\n\nFor example:\n```\nf(1) == 2 # and so on, for a good many more lines\n```",
        "```<|im_end|>\n```python\ncut off",
    ],
)
@pytest.mark.parametrize("opening", ["```python", "<answer>\n```python", "Here: ```python"])
def test_a_closing_fence_may_have_other_text_after_it(opening, ending):
    assert program(f"{opening}\n{PROGRAM}{ending}") == PROGRAM
    if ending[:3] == "```" and "python" not in ending and "\u200b" not in ending:
        tildes = ending.replace("`", "~")
        assert program(f"{opening.replace('`', '~')}\n{PROGRAM}{tildes}") == PROGRAM


@pytest.mark.parametrize("fence", ["```", "~~~", "````"])
@pytest.mark.parametrize("indent", [4, 8])
def test_an_indented_fence_in_a_docstring_ends_nothing(fence, indent):
    spaces = " " * indent
    code = (
        f'def f(x):\n    """Add one.\n\n{spaces}{fence}python\n{spaces}f(1)\n{spaces}{fence}\n'
        '    """\n    return x + 1\n'
    )
    outer = fence[0] * len(fence)
    assert program(f"{outer}python\n{code}{outer}\n") == code
    assert program(f"So: {outer}python\n{code}{outer}\n") == code
    assert program(f"- so\n\n  {outer}python\n" + _indent(code, 2) + f"  {outer}\n") == code


def _indent(code: str, by: int) -> str:
    return "".join(" " * by + line if line.strip() else line for line in code.splitlines(True))


@pytest.mark.parametrize("code", ["def f(x):\n  if x:\n    return 1\n  return 2\n", PROGRAM])
def test_a_list_that_its_block_forgets(code):
    assert program(f"1. So:\n   ```python\n{code}```\n2. more\n") == code
    assert program(f"10. So:\n    ```python\n{code}    ```\n") == code
    assert program(f"- a\n  - b\n\n    ```python\n{_indent(code, 4)}    ```\n") == code
    assert program(f"    ```python\n{_indent(code, 4)}    ```\n") == code


LONG = "\n".join(f"echo line {i}" for i in range(20)) + "\n"
USAGE = "\n".join(f"print(f({i}))" for i in range(20)) + "\n"


@pytest.mark.parametrize("mark", ["bash", "text", "", "console", "json", "sh", "output", "cpp"])
@pytest.mark.parametrize("entry", ["f", None])
def test_a_longer_block_of_another_sort_is_not_the_program(mark, entry):
    python = f"```python\n{PROGRAM}```\n"
    other = f"```{mark}\n{LONG}```\n"
    for reply in (python + "Run:\n" + other, "Output:\n" + other + "by\n" + python):
        assert program(reply, entry) == PROGRAM


@pytest.mark.parametrize("mark", ["py", "Python", "python3", "PYTHON", "{.python}", "python x=1"])
def test_marks_of_python(mark):
    assert program(f"```\n{LONG}```\n```{mark}\n{PROGRAM}```\n") == PROGRAM


def test_the_block_that_defines_what_is_asked_for_is_the_program():
    for mark in ("python", "", "py"):
        reply = f"```{mark}\n{PROGRAM}```\nUse it:\n```python\n{USAGE}```\n"
        assert program(reply, "f") == PROGRAM
    method = "class Solution:\n    def f(self, x):\n        return x\n"
    reply = f"```python\n{method}```\nTests:\n```python\n{USAGE}s = Solution()\n```\n"
    assert program(reply, "Solution.f") == method
    # The longest of those that do; and one that is broken is an answer, too.
    longer = PROGRAM + "\n\nprint(f(1))\n"
    assert program(f"```py\n{PROGRAM}```\n```py\n{longer}```\n", "f") == longer
    broken = "def f(x):\n    return (x\n"
    assert program(f"```python\n{broken}```\n```python\n{USAGE}```\n", "f") == broken
    # What defines nothing is graded all the same, as is a block of another language.
    assert program(f"```python\n{USAGE}```\n```python\nx\n```\n", "f") == USAGE
    assert program(f"```text\n{USAGE}```", "f") == USAGE


@pytest.mark.parametrize(
    "shown",
    [
        "1 2 3 " * 30,
        "1\n2\n" * 30,
        str(list(range(60))),
        str({"a": [(1, -2.5)] * 20}),
        "YES\nNO\n" * 20,
        "total: 5\n" * 20,
        "python main.py < input.txt" + " " * 90,
        "Case #1: 3\n" * 20,
    ],
)
@pytest.mark.parametrize("mark", ["", "python"])
def test_of_blocks_alike_what_is_shown_of_data_is_not_the_program(mark, shown):
    other = f"```{mark}\n{shown}\n```\n"
    for code in (
        "n=int(input())\nprint(n)\n",
        "import sys\n\nprint(*sys.stdin)\n",
        "print(input())\n",
        "n = int(input(\nprint(n)\n",  # a broken one is an answer, too
    ):
        block = f"```{mark}\n{code}```\n"
        for reply in (f"{block}Output:\n{other}", f"Of\n{other}makes:\n{block}"):
            assert program(reply) == code
            assert extract(reply).chosen == "the longest of those that do something"
    assert program(other + f"```{mark}\n5\n```") == shown + "\n"


@pytest.mark.parametrize(
    "code",
    [
        "f: Callable = lambda x: x\n",
        "f : Callable[[int], int]=lambda x: x\n",
        "from m import x as f\n",
        "from a.b import (x as f)\n",
        "import x as f\n",
    ],
)
def test_every_way_to_define_what_is_asked_for_counts(code):
    assert program(f"```python\n{code}```\n```python\n{USAGE}```\n", "f") == code
    # To use it is not to define it.
    usage = f"from solution import f\n{USAGE}d = {{\n    f: 1,\n}}\nif f == 1:\n    f = 2\n"
    assert program(f"```python\n{code}```\n```python\n{usage}```\n", "f") == code
    method = "class Solution:\n    f: Callable = lambda self, x: x\n"
    assert program(f"```python\n{method}```\n```python\n{USAGE}```\n", "Solution.f") == method


def test_which_block_was_graded_is_said():
    reply = f"```python\n{PROGRAM}```\n```python\n{USAGE}```\n"
    assert extract(reply, entry="f").chosen == "the one that defines what is asked for"
    assert extract(reply).chosen == "the longest"
    marked = extract(f"```python\n{PROGRAM}```\n```\n{USAGE}```\n")
    assert marked.chosen == "the longest of those that are marked as Python"


def test_official_readings_know_no_marks():
    reply = f"```python\n{PROGRAM}```\n```bash\n{LONG}```\n"
    assert extract(reply, "longest", "f").code == LONG
    assert extract(reply, "last", "f").code == LONG
    assert extract(f"```python\n{PROGRAM}```</answer>", "last").code == PROGRAM


def test_a_block_that_is_cut_off_is_none():
    assert extract("```python\ndef f(").kind == "truncated_attempt"
    found = extract(f"```python\n{PROGRAM}```\nBetter:\n```python\ndef f(", entry="f")
    assert (found.code, found.cut) == (PROGRAM, True)


@pytest.mark.parametrize("word", ["Done", "python", "end", "text"])
@pytest.mark.parametrize("opening", ["```python", "Here: ```python", "```", "~~~py"])
def test_a_closing_fence_may_have_one_word_directly_behind(opening, word):
    fence = "~~~" if "~" in opening else "```"
    for ending in (word, word + "\n", f"{word}\n\nIt prints:\n{fence}\n1 2 3\n{fence}\n"):
        found = extract(f"{opening}\n{PROGRAM}{fence}{ending}")
        assert (found.code, found.cut) == (PROGRAM, False), ending
    listed = f"1. So:\n   {fence}python\n{_indent(PROGRAM, 3)}   {fence}{word}\n"
    assert program(listed) == PROGRAM
    # Where the reading without it gives a program, it ends nothing; nor where it gives none.
    docstring = f'def f(x):\n    """Add.\n{fence}{word}\nf(1)\n'
    whole = f'{docstring}    """\n    return x\n'
    assert program(f"{fence}python\n{whole}{fence}") == whole
    assert extract(f"{fence}python\n{docstring}").kind == "truncated_attempt"
    assert extract(f"{fence}python\n{fence}{word}\n").kind == "truncated_attempt"


@pytest.mark.parametrize(
    "code",
    [
        "import " + "a." * 50_000 + "b",
        "import " + "a . \\\n" * 30_000 + "b",
        "a" + "\u0300\u0316" * 50_000,
        "(" * 100_000,
        "-" * 100_000 + "1",
        "a" + ".b" * 50_000,
        "f" + "()" * 50_000,
        "\ud800" * 50_000,
        "\0" * 50_000,
    ],
)
def test_sources_that_the_parser_would_choke_on_are_left_to_the_sandbox(code):
    assert missing_entry(Attempt(code), "f") is None
    assert extract(f"```python\n{code}\n```</answer>").code == code + "\n"
