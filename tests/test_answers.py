"""Given answers become the very tokens that the policy would have sampled to write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from online_dpo.answers import AnswerEncoder
from online_dpo.errors import DataError
from online_dpo.prompts import encode
from online_dpo.templates import DIALOGUE_TEMPLATE, use_template
from online_dpo.types import Message

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STARTS_ANEW = "{% for m in messages %}({{ m.content }}){% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"
BOS, END, TURN, TURN_END = 0, 1, 2, 3
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


def make_tokenizer(template: str | None = None) -> Any:
    """One token a byte, but for " t" and "he"; white space and words are not cut apart before. Adds `<s>`."""
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he"]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "t"), ("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": list(SPECIAL[2:])}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = template
    return fast


PLAIN, CHAT = make_tokenizer(), make_tokenizer(CHATML)
DIALOGUE = use_template(make_tokenizer(), "dialogue")


def said(*turns: str) -> list[Message]:
    """Turns of user and assistant by turns."""
    return [Message("assistant" if place % 2 else "user", text) for place, text in enumerate(turns)]


def written(tokenizer: Any, messages: list[Message], answer: str, ends: tuple[int, ...] = (END,)) -> str:
    """Prompt and answer as one text, from their tokens."""
    encoder = AnswerEncoder(tokenizer, ends)
    token_ids = encoder.answer(messages, answer)
    assert token_ids is not None
    text: str = tokenizer.decode([*encoder.prompt(messages), *token_ids])
    return text


def test_plain_text_is_joined_by_one_space_and_ends_with_the_end_token() -> None:
    assert written(PLAIN, said("Tom ran"), "to the dog.") == "<s>Tom ran to the dog.</s>"
    assert written(PLAIN, said("Tom ran\n"), "to the dog.") == "<s>Tom ran\nto the dog.</s>"


def test_an_answer_never_runs_into_its_prompt() -> None:
    """The space at the prompt's end and the answer's t are one token together, and stay two."""
    encoder = AnswerEncoder(PLAIN, (END,))
    prompt = encoder.prompt(said("Tom ran "))
    joint = tuple(PLAIN("Tom ran to")["input_ids"])
    assert joint[: len(prompt)] != prompt
    t, o = PLAIN.convert_tokens_to_ids(["t", "o"])
    assert encoder.answer(said("Tom ran "), "to") == (t, o, END)


def test_a_chat_answer_ends_with_the_end_of_turn_that_the_template_writes() -> None:
    """Not with the end token, and without the new line after it."""
    text = written(CHAT, said("hi"), "hello", ends=(END, TURN_END))
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>"
    # A special token that the model's folder does not name as an end is the template's all the same.
    assert AnswerEncoder(CHAT, (END,)).answer(said("hi"), "hello")[-1:] == (TURN_END,)  # type: ignore[index]


def test_several_turns_are_the_answers_context() -> None:
    text = written(CHAT, said("hi", "hello", "who?"), "me", ends=(TURN_END,))
    assert text.endswith(
        "<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\nme<|im_end|>"
    )


def test_a_dialogue_is_written_as_in_hh() -> None:
    text = written(DIALOGUE, said("hi", "hello", "who?"), "me.\n\nOr you.")
    assert text == "<s>\n\nHuman: hi\n\nAssistant: hello\n\nHuman: who?\n\nAssistant: me.\n\nOr you.</s>"
    system = [Message("system", "Be kind."), Message("user", "hi")]
    assert written(DIALOGUE, system, "yes") == "<s>Be kind.\n\nHuman: hi\n\nAssistant: yes</s>"
    with pytest.raises(DataError, match="a dialogue has turns of user and assistant"):
        encode([Message("user", "hi"), Message("tool", "42")], DIALOGUE, "here")


def test_a_dialogue_has_no_begin_token_where_plain_text_has_none() -> None:
    bare = make_tokenizer()
    bare.backend_tokenizer.post_processor = processors.ByteLevel()
    assert use_template(bare, "dialogue").chat_template == DIALOGUE_TEMPLATE
    assert written(bare, said("hi"), "yes") == "\n\nHuman: hi\n\nAssistant: yes</s>"


def test_a_template_that_writes_finished_turns_otherwise() -> None:
    """The finished turn does not begin as the prompt does: the answer alone follows the prompt."""
    assert written(make_tokenizer(STARTS_ANEW), said("hi"), "yes") == "(hi)[answer]yes</s>"


def test_an_answer_that_holds_an_end_is_none() -> None:
    """The policy stops there: it could not have gone on."""
    assert AnswerEncoder(PLAIN, (END,)).answer(said("hi"), "a</s>b") is None
    assert AnswerEncoder(CHAT, (END,)).answer(said("hi"), "a<|im_end|>b") is None
    assert AnswerEncoder(PLAIN, (END,)).answer(said("hi"), "a<|im_end|>b") is not None


def test_which_token_ends_plain_answers() -> None:
    """The tokenizer's end token where the engine stops at it, else the engine's first; none where there is none."""

    def last(tokenizer: Any, ends: tuple[int, ...]) -> int:
        token_ids = AnswerEncoder(tokenizer, ends).answer(said("hi"), "x")
        assert token_ids is not None
        return token_ids[-1]

    endless = make_tokenizer()
    endless.eos_token = None
    assert last(PLAIN, (TURN_END, END)) == END
    assert last(PLAIN, (TURN_END,)) == TURN_END
    assert last(PLAIN, ()) == END
    assert last(endless, ()) == endless.convert_tokens_to_ids("x")


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1).map(str.strip).filter(bool)


@given(turns=st.lists(TEXT, min_size=1, max_size=3).filter(lambda turns: len(turns) % 2 == 1), answer=TEXT)
def test_tokens_write_what_the_template_writes(turns: list[str], answer: str) -> None:
    """Whatever the texts: prompt and answer together decode to the whole dialogue, and the prompt's tokens stay."""
    messages = said(*turns)
    for tokenizer, end in ((CHAT, TURN_END), (DIALOGUE, END)):
        encoder = AnswerEncoder(tokenizer, (end,))
        token_ids = encoder.answer(messages, answer)
        assert token_ids is not None
        assert token_ids[-1] == end
        rows = [{"role": m.role, "content": m.content} for m in (*messages, Message("assistant", answer))]
        whole = tokenizer.apply_chat_template(rows, tokenize=False)
        text = tokenizer.decode([*encoder.prompt(messages), *token_ids[:-1]], clean_up_tokenization_spaces=False)
        assert whole.startswith(text)
        assert text.endswith(answer)


@given(before=TEXT, answer=TEXT)
def test_plain_tokens_write_both_texts(before: str, answer: str) -> None:
    encoder = AnswerEncoder(PLAIN, (END,))
    token_ids = encoder.answer(said(before), answer)
    assert token_ids is not None
    text = PLAIN.decode([*encoder.prompt(said(before)), *token_ids], clean_up_tokenization_spaces=False)
    assert text == f"<s>{before} {answer}</s>"


def test_real_story_tokens(stories: Path) -> None:
    """SentencePiece-like tokens, whose words carry their space: the answer's tokens are those of the joint text."""
    from online_dpo.model_config import end_token_ids
    from online_dpo.models import load_tokenizer

    tokenizer: Any = load_tokenizer(stories)
    encoder = AnswerEncoder(tokenizer, end_token_ids(stories))
    answer = encoder.answer(said("Once upon a time,"), "there was a dog.")
    whole = tokenizer("Once upon a time, there was a dog.")["input_ids"]
    assert [*encoder.prompt(said("Once upon a time,")), *(answer or ())] == [*whole, tokenizer.eos_token_id]


# --- which template ---


def test_a_template_file_is_found_beside_the_experiment(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(CHATML, encoding="utf-8")
    assert use_template(make_tokenizer(), "mine.jinja", [tmp_path]).chat_template == CHATML
    assert use_template(make_tokenizer(CHATML), None).chat_template == CHATML
    with pytest.raises(
        DataError, match=r'no file mine\.jinj \(did you mean \'mine\.jinja\'\?\); or the word "dialogue"'
    ):
        use_template(make_tokenizer(), "mine.jinj", [tmp_path])
    with pytest.raises(DataError, match=r"no file dialog \(did you mean 'dialogue'\?\)"):
        use_template(make_tokenizer(), "dialog", [tmp_path])
