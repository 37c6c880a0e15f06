"""Conversations: each turn sees those before it, and whatever ends an answer, the next one can be asked for."""

import signal
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import make_tokenizer, only_line

from qoq.cli.main import group
from qoq.errors import QoqError
from qoq.runtime.conversation import Conversation
from qoq.runtime.engine import Answer, LLMEngine, RequestOutput
from qoq.runtime.sampler import SamplingParams
from qoq.runtime.scheduler import Chunk

SHORT = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture
def engine(checkpoint_folder):
    return LLMEngine.from_checkpoint(checkpoint_folder(), max_num_seqs=1, memory_bytes=1 << 20)


class Fake:
    """An engine whose answers are a script: pieces of text, and exceptions to raise; it keeps the prompts."""

    def __init__(self, *answers, max_model_len=256):
        self.tokenizer, self.max_model_len = make_tokenizer(), max_model_len
        self.answers, self.prompts, self.closed = list(answers), [], 0

    def stream(self, tokens, params):
        self.prompts.append(self.tokenizer.decode(tokens))
        text = ""
        try:
            for count, piece in enumerate(self.answers.pop(0), start=1):
                if not isinstance(piece, str):
                    raise piece
                text += piece
                yield RequestOutput("own", list(tokens), Answer([0] * count, [text]), count, 1, piece)
        finally:
            self.closed += 1


def talk(monkeypatch, engine, lines, *options):
    """Run `qoq chat` on this engine with these lines on stdin."""
    monkeypatch.setattr(LLMEngine, "from_checkpoint", lambda *args, **kwargs: engine)
    return CliRunner().invoke(group, ["chat", "anywhere", *options], input="".join(line + "\n" for line in lines))


# The conversation


def test_a_turn_sees_those_before_it(engine):
    conversation = Conversation(engine, "Be kind")
    first = list(conversation.answer("Hello", SHORT))[-1]
    assert engine.tokenizer.decode(first.prompt_token_ids) == "s:Be kind\nu:Hello\na:"
    second = list(conversation.answer("And?", SHORT))[-1]
    told = [*conversation.messages]
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user", "assistant"]
    assert [told[2]["content"], told[4]["content"]] == [first.text, second.text]
    expected = engine.tokenizer.apply_chat_template(told[:4], add_generation_prompt=True, return_dict=False)
    assert second.prompt_token_ids == expected
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be kind"}]


def test_a_turn_computes_only_what_is_new(engine, monkeypatch):
    conversation = Conversation(engine)
    list(conversation.answer("x" * 100, SHORT))
    steps: list[list[Chunk]] = []
    schedule = engine.scheduler.schedule

    def watched() -> list[Chunk]:
        steps.append(schedule())
        return steps[-1]

    monkeypatch.setattr(engine.scheduler, "schedule", watched)
    list(conversation.answer("And?", SHORT))
    assert steps[0][0].start == 64  # the full page


def test_an_answer_that_is_left_early_stays_as_far_as_it_came(engine):
    conversation = Conversation(engine)
    turn = conversation.answer("Hello", SHORT)
    said = next(turn).text
    turn.close()
    assert conversation.messages[1:] == [{"role": "assistant", "content": said}]
    assert not engine.has_unfinished_requests()
    assert list(conversation.answer("Go on", SHORT))[-1].finish_reason == "length"


def test_a_conversation_as_long_as_the_model(engine):
    conversation = Conversation(engine)
    with pytest.raises(QoqError, match="conversation of 306 tokens, the model takes fewer than 256; /reset"):
        next(conversation.answer("x" * 301))
    assert conversation.messages == []


def test_what_the_engine_could_not_answer_does_not_stay():
    failed = RequestOutput("own", [1], Answer(), 0, 0, "", "error", "the model's output is not a number")
    engine: Any = Fake()
    engine.stream = lambda *args: iter([failed])
    conversation = Conversation(engine)
    with pytest.raises(QoqError, match="not a number"):
        list(conversation.answer("Hello"))
    assert conversation.messages == []


def test_a_template_that_refuses_and_none_at_all():
    fake: Any = Fake(["fine"])
    fake.tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(QoqError, match="chat template refuses the messages: no system messages"):
        next(Conversation(fake, "Be kind").answer("Hello"))
    fake.tokenizer.chat_template = None
    with pytest.raises(QoqError, match="no chat template"):
        Conversation(fake)


# The command


def test_each_line_is_a_turn(monkeypatch):
    fake = Fake(["Hi", "!"], ["Fine"])
    result = talk(monkeypatch, fake, ["Hello", "", "  ", "How are you?"], "--system", "Be kind")
    assert (result.exit_code, result.stdout) == (0, "Hi!\nFine\n")
    assert fake.prompts == ["s:Be kind\nu:Hello\na:", "s:Be kind\nu:Hello\na:Hi!\nu:How are you?\na:"]
    speeds = result.stderr.splitlines()
    assert len(speeds) == 2 and speeds[0].startswith("2 tokens, ") and speeds[0].endswith(" tokens/s")


def test_reset_and_exit(monkeypatch):
    fake = Fake(["one"], ["two"])
    result = talk(monkeypatch, fake, ["a", "/reset", "b", "/exit", "c"], "--system", "Be kind")
    assert (result.exit_code, result.stdout) == (0, "one\ntwo\n") and "a new conversation" in result.stderr
    assert fake.prompts == [f"s:Be kind\nu:{text}\na:" for text in "ab"]


def test_an_interrupt_stops_the_answer_alone(monkeypatch):
    fake = Fake(["one ", "two ", KeyboardInterrupt(), "three"], [KeyboardInterrupt()], ["after"])
    result = talk(monkeypatch, fake, ["count", "again", "and now?"])
    assert (result.exit_code, result.stdout) == (0, "one two \nafter\n") and result.stderr.count("stopped") == 2
    assert fake.prompts[2] == "u:count\na:one two \nu:and now?\na:"  # "again" had no answer


def test_ctrl_c_waits_for_the_token(monkeypatch):
    class Pressed(Fake):
        def stream(self, tokens, params):
            for output in super().stream(tokens, params):
                if output.text == "one two":
                    signal.raise_signal(signal.SIGINT)
                yield output

    before = signal.getsignal(signal.SIGINT)
    fake = Pressed(["one", " two", " three"], ["after"])
    result = talk(monkeypatch, fake, ["count", "and now?"])
    assert (result.exit_code, result.stdout) == (0, "one two\nafter\n") and fake.closed == 2
    assert fake.prompts[1] == "u:count\na:one two\nu:and now?\na:"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_full_conversation_goes_on_after_a_reset(monkeypatch, engine):
    result = talk(monkeypatch, engine, ["x" * 100, "y" * 150, "/reset", "z" * 100], "--max-tokens", "3")
    assert result.exit_code == 0
    first, full, reset, second = result.stderr.splitlines()
    assert full.startswith("qoq: conversation of ") and full.endswith("fewer than 256; /reset starts a new one")
    assert "tokens/s" in first and reset == "a new conversation" and "tokens/s" in second


def test_an_answer_may_fill_the_model(monkeypatch, engine):
    result = talk(monkeypatch, engine, ["x" * 240])
    assert result.exit_code == 0 and int(result.stderr.split()[0]) <= 256 - 240


def test_bytes_that_are_no_text(monkeypatch):
    fake = Fake(["fine"])
    monkeypatch.setattr(LLMEngine, "from_checkpoint", lambda *args, **kwargs: fake)
    result = CliRunner().invoke(group, ["chat", "anywhere"], input=b"a\xffb\n")
    assert (result.exit_code, result.stdout) == (0, "fine\n") and fake.prompts == ["u:a\ufffdb\na:"]


def test_a_system_message_without_a_place(qoq, checkpoint_folder, monkeypatch):
    code, out, err = qoq("chat", checkpoint_folder(), "--prompt", "Hello", "--raw", "--system", "Be kind")
    assert (code, out) == (2, "") and "--system is for the chat template" in err
    fake: Any = Fake(["fine"])
    fake.tokenizer.chat_template = None
    monkeypatch.setattr(LLMEngine, "from_checkpoint", lambda *args, **kwargs: fake)
    line = only_line(qoq("chat", "anywhere", "--prompt", "Hello", "--system", "Be kind"))
    assert "no chat template: nothing says where a system message goes" in line


def test_errors(qoq, checkpoint_folder):
    assert "no such checkpoint folder" in only_line(qoq("chat", "./absent"))
    for option in ("--json", "--raw"):
        code, out, err = qoq("chat", checkpoint_folder(), option)
        assert (code, out) == (2, "") and f"{option} needs --prompt" in err
