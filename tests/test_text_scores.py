from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from qalora.recipe import load_recipe
from qalora.text_scores import exact_match, rouge_l, said, words

ENGLISH = st.lists(
    st.sampled_from(
        ["the", "The", "cat", "cats", "sat,", "mat.", "don't", "it's", "3", "3.5", "x_y", "(so)", "-", "US!"]
    ),
    min_size=1,
)
LETTERS = st.characters(categories=("Lu", "Ll", "Lt", "Lo", "Nd"))


@pytest.mark.parametrize(
    ("answer", "reference", "pattern", "expected"),
    [
        (" #### 4\n", "#### 4", None, 100),
        ("#### 5.", "#### 5", None, 0),
        ("so #### 4 #### 9", "2 + 2\n#### 4", r"#### (-?\d+)", 100),
        ("6", "#### 6", r"#### (-?\d+)", 0),
    ],
    ids=["blanks around", "another text", "the first match", "no match"],
)
def test_exact_match_compares_texts_or_what_the_pattern_finds(answer, reference, pattern, expected):
    assert exact_match(answer, [reference], pattern) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("So 18 left.\n#### 18", "#### 18", True),
        ("#### 1,080", "#### 1080", True),
        ("#### 1080", "#### 1,080", True),
        ("#### $18.", "#### 18", True),
        ("####18", "#### 18", True),
        ("#### -$5", "#### -5", True),
        ("#### 2.5", "#### 2.5", True),
        ("#### 2.5", "#### 25", False),
        ("#### 5", "#### -5", False),
        ("The answer is 18", "#### 18", False),
    ],
)
def test_numbers_are_compared_as_gsm8k_s_own_scorer_does(answer, reference, right):
    settings = load_recipe("gsm8k", [("model", "m")]).evaluation
    assert exact_match(answer, [reference], settings.answer_pattern, settings.normalize) == 100 * right


@given(ENGLISH, ENGLISH)
def test_rouge_of_english_is_that_of_rouge_score(left, right):
    reference, answer = " ".join(left), " ".join(right)
    theirs = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure if words(reference) else None
    if theirs is not None:
        assert rouge_l(answer, [reference]) == pytest.approx(100 * theirs)


@given(st.text(st.characters(max_codepoint=127)))
def test_words_of_ascii_are_rouge_score_s(text):
    from rouge_score.tokenize import tokenize

    assert words(text) == tokenize(text, None)


@given(st.text())
def test_equal_texts_score_100(text):
    assert rouge_l(text, [text]) == pytest.approx(100)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Москва — столица России.", ["москва", "столица", "россии"]),
        ("北京是首都。", ["北", "京", "是", "首", "都"]),
        ("東京タワー2024", ["東", "京", "タ", "ワ", "ー", "2024"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("서울은 수도", ["서울은", "수도"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("Müller, naïve", ["müller", "naïve"]),
        (unicodedata.normalize("NFD", "Müller"), ["müller"]),
        ("GPU用的", ["gpu", "用", "的"]),
        ("snake_case don't", ["snake", "case", "don", "t"]),
        ("🙂!", []),
    ],
    ids=[
        "Russian",
        "Chinese",
        "Japanese",
        "Hindi",
        "Korean",
        "Thai",
        "umlauts",
        "decomposed",
        "mixed",
        "ASCII",
        "no word",
    ],
)
def test_words_of_every_script(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize(
    ("left", "right"), [("Müller", "Möller"), ("日本", "中国"), ("да", "нет"), ("!", "?"), ("", "a")]
)
def test_different_texts_score_nothing(left, right):
    assert rouge_l(left, [right]) == 0


def test_half_of_a_chinese_answer_scores_two_thirds():
    assert rouge_l("北京", ["北京首都"]) == pytest.approx(100 * 2 / 3)


def test_the_best_of_several_references_counts():
    references = ["the capital is Paris", "Paris"]
    assert (exact_match("Paris", references), rouge_l("Paris", references)) == (100, 100)
    assert exact_match("Rome", references) == 0


@given(st.text(LETTERS, min_size=1), st.text(LETTERS, min_size=1))
def test_rouge_is_symmetric_and_within_0_and_100(left, right):
    assert 0 <= rouge_l(left, [right]) <= 100 + 1e-9
    assert rouge_l(left, [right]) == pytest.approx(rouge_l(right, [left]))


@pytest.mark.parametrize(
    ("prompt", "answer", "references", "score"),
    [
        ("Q <think>\n", "\n</think>\n\nHello", ["Hello"], 100.0),
        ("Q <think>\n", "Hello", ["Hello"], 0.0),
        ("Q <think>\n", "Hello </think> no", ["Hello"], 0.0),
        ("Q <reasoning>\n", "two and two</reasoning>Four", ["Four"], 100.0),
        ("Q ", "<think>\n\n</think>\n\nHello", ["Hello"], 100.0),
        ("Q ", "<think>\nTwo and two\n</think>\n\nFour", ["Four", "4"], 100.0),
        ("Q ", "Four", ["Four"], 100.0),
        ("Q ", "<think>a</think>Four", ["<think>a</think>Four"], 100.0),
        ("Q ", "<think>b</think>Four", ["<think>a</think>Four"], 0.0),
    ],
)
def test_a_thought_is_no_part_of_an_answer_whose_reference_has_none(prompt, answer, references, score):
    assert exact_match(said(answer, references, prompt), references) == score
