"""Thinking is not the answer: for every mark, every policy and every environment."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rlrf
from rlrf import Completion, Feedback, Outcome, Prompt, Rollout, SamplingParams, Segment, Task, Turn
from rlrf.messages import action_message
from rlrf.policy import ScriptedPolicy
from rlrf.reasoning import opened_by, split_reasoning
from rlrf.wrappers import FeedbackLevel
from tests.environments_for_tests import Bytes, Recorder

RIGHT = "```python\nprint(int(input()) * 2)\n```"
WRONG = "```python\nn = int(input())\nprint(n * 3)  # a longer, wrong draft\n```"
OPEN_FENCE = "```python\nn = int(input())  # never closed\n"

PAIRS = [
    ("<think>", "</think>"),
    ("<think>\n", "\n</think>\n\n"),
    ("  \n<think>", "</think>"),
    ("<Think>", "</Think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<think:opensource>", "</think:opensource>"),
    ("<mm:think>", "</mm:think>"),
    ("◁think▷", "◁/think▷"),
    ("<|channel>thought\n", "<channel|>"),
    ("<unused94>thought\n", "<unused95>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|start_think|>", "<|end_think|>"),
    (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    ("analysis", "assistantfinal"),
    ("assistantanalysis", "assistantfinal"),
]


def parts(text, opened=""):
    """The reasoning and the answer of a text."""
    reply = split_reasoning(text, opened)
    return reply.reasoning, text[reply.start : reply.end]


@pytest.mark.parametrize(("opens", "closes"), PAIRS)
def test_every_mark(opens, closes):
    for draft in (WRONG, OPEN_FENCE, "", "x\n\ny", "I won't say 'x'. \"Quoted\" `code`."):
        for answer in (RIGHT, "42", "", "two\nlines"):
            text = opens + draft + closes + answer
            assert parts(text) == (draft.strip(), answer)
    if closes != "assistantfinal":  # without its special tokens there is no telling
        assert parts(opens + RIGHT) == (RIGHT, "")  # cut off
        assert parts(opens) == ("", "")


@pytest.mark.parametrize("closes", [c for o, c in PAIRS if o[0] in "<[◁" and "final" not in c])
def test_a_section_that_the_template_opened(closes):
    for draft in (WRONG, OPEN_FENCE, "so", "no newline: 42", "I won't say 'x'."):
        assert parts(f"{draft}{closes}{RIGHT}") == (draft.strip(), RIGHT)
        assert parts(f"{draft}\n{closes}\n{RIGHT}") == (draft.strip(), RIGHT)


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        # several, nested, repeated
        ("<think>a</think><think>b</think>c", "a</think><think>b", "c"),
        ("<think>a</think>\n[THINK]b[/THINK]\nc", "a</think>\n[THINK]b", "c"),
        ("<think>a<think>b</think>c</think>d", "a<think>b</think>c", "d"),
        ("<think>a</think>b</think>c", "a</think>b", "c"),
        ("a</think>b</think>c", "a</think>b", "c"),
        ("<think>a</think>b\n<think>c</think>\nd", "a</think>b\n<think>c", "d"),
        ("Sure.\n<think>a</think>\nd", "Sure.\n<think>a", "d"),
        # never closed
        ("<think>a<think>b</think>c", "a<think>b</think>c", ""),
        ("<think>a</think>\n<think>b", "a</think>\n<think>b", ""),
        # mentioned in the reasoning
        ("<think>the <think> tag</think>d", "the <think> tag", "d"),
        ("I use the <think> tag.\n</think>\nd", "I use the <think> tag.", "d"),
        ("<think>it ends with `</think>`, so</think>d", "it ends with `</think>`, so", "d"),
        # a fence that is open in the reasoning, without <think>
        ("```\nx\n</think>\n```\nd\n```", "```\nx", "```\nd\n```"),
        ("Okay.\n<think>\na", "Okay.\n<think>\na", ""),
        (f"Okay.\n<think>\n{RIGHT}\nhm", f"Okay.\n<think>\n{RIGHT}\nhm", ""),
        (f"{RIGHT}\n<think>\nhm", f"{RIGHT}\n<think>\nhm", ""),
        (f"<think>a</think>{RIGHT}\n<think> hm", f"a</think>{RIGHT}\n<think> hm", ""),
        (f"Okay. <think>\n{RIGHT}\nhm", f"Okay. <think>\n{RIGHT}\nhm", ""),
        (f"{RIGHT}<think>hm", f"{RIGHT}<think>hm", ""),
        (f"<think>print('</think>')\n{RIGHT}", f"print('</think>')\n{RIGHT}", ""),
        # within a line
        ("Sure. <think>a</think>\nd", "Sure. <think>a", "d"),
        (f"Sure. <think>{WRONG}</think>\n{RIGHT}", f"Sure. <think>{WRONG}", RIGHT),
        # after the answer
        ("d\n<think>a</think>\n", "a", "d\n"),
        ("<think>a</think>d <think>b</think> [THINK]c[/THINK]", "a\n\nb</think> [THINK]c", "d "),
        ("d\n<think>a<think>b</think></think>", "a<think>b</think>", "d\n"),
        ("[THINK]a</think>b[/THINK]c", "a</think>b", "c"),
        ("a [THINK]b</think>c[/THINK]d", "a [THINK]b</think>c", "d"),
        # nothing behind the last end
        ("<think>a</think>d</think>\n", "a", "d"),
        ("a</think>\nd\n</think>", "a", "d\n"),
        ("a</think>d\n<think>b</think>\n</think>", "a\n\nb</think>", "d\n"),
        ("a</think>\n<think>b</think>\n</think>", "a</think>\n<think>b</think>", ""),
        # mentioned in a sentence, before and after the end
        (f"Cut at the </think> tag.\n</think>\n{RIGHT}", "Cut at the </think> tag.", RIGHT),
        (f"hm, </think>, so</think>{RIGHT}", "hm, </think>, so", RIGHT),
        (f"<think>a</think>{RIGHT} I cut at </think>.", "a", f"{RIGHT} I cut at </think>."),
        # a sentence that ends, or a word: no mention
        ("So it is 42. </think> the answer", "So it is 42.", "the answer"),
        ("it is 42 </think> The answer", "it is 42", "The answer"),
        ("it is 42 </think>", "it is 42", ""),
        # closed by another mark
        ("<think>a</thinking>d", "a", "d"),
        ("<thinking>a</think>\nd", "a", "d"),
        ("Sure.\n<think>a</thinking>d", "Sure.\n<think>a", "d"),
        ("<think>a[THINK]b[/THINK]c</think>d", "a[THINK]b[/THINK]c", "d"),
        ("<think>a</thinking>b</think>d", "a</thinking>b", "d"),
        # what is no text
        ("\ufeff<think>a</think>d", "a", "d"),
        ("\u200b\n<think>a</think>d", "a", "d"),
        ("<s> <think>a</think><s>d</s>", "a", "<s>d</s>"),
        ("<|begin_of_text|>[THINK]a", "a", ""),
        ("\ufeffanalysis a assistantfinald", "a", "d"),
        # channels
        ("<|start|>assistant<|channel|>analysis<|message|>a", "a", ""),
        ("<|start|>assistant<|channel|>final<|message|>d", "", "d"),
        ("<|channel|>final<|message|>d<|return|>", "", "d"),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary"
            "<|message|>b<|end|><|start|>assistant<|channel|>final<|message|>d",
            "a\n\nb",
            "d",
        ),
    ],
)
def test_where_the_reasoning_ends(text, reasoning, answer):
    assert parts(text) == (reasoning, answer)


FENCE_ENDS = (" That is all.", " done", "</answer>", "<|im_end|>")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "Use `<think>` and `</think>`.",
        'It ends at "</think>", always.',
        "```python\nx = s.split('</think>')[-1]\n```",
        '```python\nx = re.sub(r"<think>.*?</think>", "", s)\n```',
        "```python\n# what follows </think> is kept\n```",
        '```python\nP = """<think>\nhm\n</think>\n"""\n```',
        "```xml\n<think>\nhm\n</think>\n```",
        "~~~\na</think>b\n~~~",
        "the <think> tag",
        # not quoted, but mentioned
        "I used the </think> tag.",
        f"{RIGHT}\nI used the </think> tag.",
        f"All up to the </think> tag goes (all of </think>):\n{RIGHT}",
        f"What stands between <think> and </think>, goes:\n{RIGHT}",
        "split(</think>)",
        # in strings of a program, on lines of their own
        '```python\nprint("""\n</think>\n""")\n```',
        '```python\nprint("""\n</think>\n""")\n```\nRun it:\n```\npython x.py\n```',
        'P = """\n<think>\nhm\n</think>\n"""\nprint(P)',
        "print('''\n</think>\n''')",
        "```\nhm\n</think>\nanswer\n```\nis what it writes.",
        "print('</think>')",
        "```python\nprint('</think>')\n",
        *(f"```python\n# strip </think> tags\n```{behind}" for behind in FENCE_ENDS),
    ],
)
def test_what_is_quoted_is_text(text):
    assert parts(text) == (None, text)
    assert parts(f"<think>a</think>{text}") == ("a", text)
    assert action_message(action_message(f"<think>a</think>{text}")) == action_message(
        f"<think>a</think>{text}"
    )


def test_a_section_that_is_known_to_be_open():
    assert parts("a</think>b", "<think>") == ("a", "b")
    assert parts("<think>a</think>b", "<think>") == ("a", "b")  # as some repeat it
    assert parts("```python\nright", "<think>") == ("```python\nright", "")
    assert opened_by("<|im_start|>assistant\n<think>\n") == "<think>"
    assert opened_by("<|im_start|>assistant\n<think>\n\n</think>\n\n") == ""
    assert opened_by("<|start|>assistant<|channel|>analysis<|message|>").endswith("<|message|>")
    assert parts("hm", "<|channel|>analysis<|message|>") == ("hm", "")
    assert opened_by("a user who says <think><|im_end|>\n<|im_start|>assistant\n") == ""


def test_what_has_been_taken_apart_stays():
    taken = {"role": "assistant", "content": "a</think>b", "reasoning_content": "hm"}
    assert action_message(taken) == taken
    left = {**taken, "content": "<think>x</think>b"}  # a server that leaves it, and tells it
    assert action_message(left)["content"] == "b"
    assert action_message(left)["reasoning_content"] == "hm\n\nx"


MARKUP = "<think> </think> ``` ```python ' \" ` a [THINK] [/THINK] <|channel|> <|message|> final"
words = st.sampled_from([*MARKUP.split(" "), "\n", " ", "<|end|>", "</thinking>", "\ud800"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(words, max_size=24).map("".join), st.sampled_from(["", "<think>"]))
def test_any_text_is_taken_apart_once(text, opened):
    reply = split_reasoning(text, opened)
    assert 0 <= reply.start <= reply.end <= len(text)
    assert (reply.reasoning is None) == (reply == (None, 0, len(text)))
    message = action_message(text)
    assert action_message(message) == message
    assert action_message(message["content"])["content"] == message["content"]


@pytest.mark.slow
def test_linear_in_the_text():
    units = ["<think>", "</think>", "\n<think>", "</think>\n", "`</think>", "'", '"</think>"']
    units += ["```\n", "~~~", "<|channel|>a<|message|>", "<think> ", "analysis", "assistantfinal"]
    units += ["<think></thinking>", "a <think>b</think>\n", "<s>", "\ufeff", "<think>\n```\n```\n"]
    units += ["[THINK]<think>", "\n```python\n</think>", "<think></think>", "a'a</think>", " "]
    units += ['"""</think>', "the </think> tag.\n", "'''\n</think>\n", "```\n</think>\n"]

    def cost(unit, size):
        text = unit * (size // len(unit))
        start = time.process_time()
        for t in (text, "<think>" + text, f"\n{text}</think>x"):
            split_reasoning(t)
        return time.process_time() - start

    for unit in units:
        assert cost(unit, 30_000) < 1.0, unit  # measured: 0.1 at the most


# --- environments -------------------------------------------------------------------------------


class Say(rlrf.SingleTurnEnv):
    """Say "right". Blames what was said from its second character on."""

    def load_tasks(self, split):
        return [Task("t", "Say it.")]

    def grade(self, task, completion):
        if completion == "right":
            return Outcome(1.0)
        span = (min(1, len(completion)), len(completion))
        told = [Segment("wrong_answer", f"You said {completion!r}.", span=span)]
        if not completion:
            told.append(Segment("format_error", "Nothing was said."))
        return Outcome(0.0, Feedback(told))


class Talk(rlrf.MultiTurnEnv):
    """The same in turns; remembers what it heard."""

    def load_tasks(self, split):
        return [Task("t", "Say it.")]

    def start(self, task):
        self.heard = []
        return self.heard

    def respond(self, state, action):
        state.append(action)
        said = action["content"] or ""
        if said == "right":
            return Turn((), 1.0, terminated=True)
        told = Feedback.of("wrong_answer", "No.", span=(min(1, len(said)), len(said)))
        return Turn("Again.", 0.0, told, terminated=len(state) == 2)


class Whole(Say):
    reads_reasoning = True


THOUGHT = "<think>right\n```\nopen</think>\n"


def test_every_face_of_an_environment_hears_the_answer():
    for env in (Say(), FeedbackLevel(Say(), "explained")):
        for action in (
            THOUGHT + "right",
            "wrong</think>right",
            {"role": "assistant", "content": THOUGHT + "right"},
            {"role": "assistant", "content": "right", "reasoning_content": "wrong"},
        ):
            env.reset(seed=0)
            assert env.step(action)[1] == 1.0
            assert env.grade("t", action).reward == 1.0
        assert Say().grade(env._find_task("t"), THOUGHT + "right").reward == 1.0
    talk = Talk()
    talk.reset(seed=0)
    assert talk.step(THOUGHT + "right")[1] == 1.0
    assert talk.heard[0] == {
        "role": "assistant",
        "content": "right",
        "reasoning_content": "right\n```\nopen",
    }


@pytest.mark.parametrize("env", [Say(), Talk(), FeedbackLevel(Say(), "explained")])
def test_reasoning_without_an_answer_is_none(env):
    for action in (
        "<think>right",
        "<think>right\n```python\nright",
        "<think>right</think>",
        "right</think>  \n",
        {"role": "assistant", "content": None, "reasoning_content": "right"},
    ):
        env.reset(seed=0)
        _, reward, _, _, info = env.step(action)
        assert reward == 0.0
        assert info["feedback"].kinds[0] == "truncated_attempt"
        assert "format_error" not in info["feedback"].kinds
    env.reset(seed=0)
    assert "truncated_attempt" not in env.step("wrong")[4]["feedback"].kinds


def test_spans_count_in_the_text_that_was_given():
    text = THOUGHT + "wrong"
    for env in (Say(), Talk(), Whole()):
        env.reset(seed=0)
        (span,) = env.step(text)[4]["feedback"].spans
        whole = isinstance(env, Whole)
        assert text[slice(*span)] == (text[1:] if whole else "rong")


def test_an_environment_may_read_the_reasoning():
    assert Whole().grade("t", THOUGHT + "right").reward == 0.0
    (rollout,) = rlrf.rollout(Whole(), Recorder(lambda prompt: "<think>a</think>right"))
    assert rollout.reward == 0.0
    assert rollout.text == "<think>a</think>right"
    assert rollout.spans == (((1, 21),),)
    wrapped = FeedbackLevel(Whole(), "explained")
    assert rlrf.rollout(wrapped, lambda messages: "<think>a</think>right")[0].reward == 0.0


def test_reasoning_that_is_not_in_the_text_stays_beside_it():
    for reply in (
        {"content": "ans", "reasoning_content": "so"},
        {"content": "also", "reasoning_content": "so"},
        {"content": "", "reasoning_content": "so"},
        {"content": None, "reasoning_content": "so", "tool_calls": [{"id": "1"}]},
    ):
        (rollout,) = rlrf.rollout(Whole(), lambda messages, reply=reply: reply)
        assert rollout.messages[-1]["content"] == (reply["content"] or "")
        assert rollout.messages[-1]["reasoning_content"] == "so"
    text = "analysis aassistantcommentary bassistantfinalc"
    message = {"role": "assistant", "content": "c", "reasoning_content": "a\n\nb"}
    whole = Completion((1,), (2,), (), text, message=message).whole_message
    assert whole == {"role": "assistant", "content": text}


# --- policies -----------------------------------------------------------------------------------


class Server:
    """A policy of somebody else's: it knows nothing of reasoning."""

    def __init__(self, text):
        self.text = text

    def generate(self, prompts, params):
        return [Completion((1,), (2, 3), (-1.0, -1.0), self.text) for _ in prompts]


@pytest.mark.parametrize(
    "make",
    [
        lambda text: ScriptedPolicy(lambda messages: text),
        lambda text: lambda messages: text,  # a bare callable
        lambda text: ScriptedPolicy(lambda messages: {"role": "assistant", "content": text}),
        Server,
        lambda text: Recorder(lambda prompt: text),
    ],
)
def test_every_policy(make):
    for text in (THOUGHT + "right", "wrong</think>right"):
        (rollout,) = rlrf.rollout(Say(), make(text))
        assert (rollout.reward, rollout.text) == (1.0, "right")
        assert rollout.messages[-1]["reasoning_content"] in ("right\n```\nopen", "wrong")
        assert Rollout.from_dict(rollout.to_dict()) == rollout
    (rollout,) = rlrf.rollout(Say(), make("<think>right"), params=SamplingParams(max_tokens=99))
    assert (rollout.reward, rollout.text) == (0.0, "")
    assert rollout.feedback[0].kinds[0] == "truncated_attempt"
    assert rlrf.evaluate(Say(), make(THOUGHT + "right")).pass_rate == 1.0


texts = st.text(st.sampled_from("aé𝄞 \n'`") | st.characters(codec="utf-8"), max_size=12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts, texts.filter(str.strip), st.data())
def test_spans_map_to_the_sampled_tokens_of_the_answer(thought, answer, data):
    text = f"<think>{thought}</think>{answer}"
    message = action_message(text)
    content = message["content"]
    if not content:
        return
    a = data.draw(st.integers(0, len(content) - 1))
    b = data.draw(st.integers(a + 1, len(content)))

    class Blame(Say):
        def grade(self, task, completion):
            assert completion == content
            return Outcome(0.0, Feedback.of("wrong_answer", "No.", span=(a, b)))

    (rollout,) = rlrf.rollout(Blame(), Recorder(lambda prompt: text))
    ((span,),) = rollout.spans
    ids = [i for i in rollout.completion_ids[slice(*span)] if i < 256]
    assert Bytes().decode(ids) == content[a:b]


def test_a_prompt_of_a_policy_is_still_a_message():
    (completion,) = ScriptedPolicy(lambda m: "<think>a</think>b").generate(
        [Prompt(({"role": "user", "content": "x"},))], SamplingParams()
    )
    assert completion.text == "<think>a</think>b"
    assert completion.assistant_message["content"] == "b"
    assert completion.whole_message == {"role": "assistant", "content": "<think>a</think>b"}


# --- programs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", [False, True])
def test_programs_are_taken_from_the_answer(compat):
    renderer = "sdpo-compat" if compat else "rlrf"
    env = rlrf.make(
        "code-basics-v0", sandbox="process", allow_unsafe=True, slots=1, renderer=renderer
    )
    try:
        task = env.tasks()[0].id
        right = env.reference_solution(env._find_task(task))
        wrong = "```python\nx = 1\n" + "# a longer, wrong draft\n" * 50 + "```"
        for text, reward in (
            (f"<think>{wrong}</think>{right}", 1.0),
            (f"<think>{right}", 0.0),
            (f"<think>{right}</think>{wrong}", 0.0),
            (f"{wrong}</think>\n{right}", 1.0),
            (f"<think>```python\nopen\n</think>{right}", 1.0),
            (f"Okay.\n<think>\n{right}\nhm, but wait", 0.0),
            (f"{right}\n<think>\n{wrong}\n</think>", 1.0),
        ):
            if not compat:
                got, feedback = env.grade(task, text)
                assert got == reward, text
                if text in (f"<think>{right}", f"Okay.\n<think>\n{right}\nhm, but wait"):
                    assert feedback.kinds[0] == "truncated_attempt"
        if compat:  # the longest block of all, as in the official code
            assert env.grade(task, f"<think>{right}").reward == 1.0
            assert env.grade(task, f"<think>{wrong}</think>{right}").reward == 0.0
    finally:
        env.close()
