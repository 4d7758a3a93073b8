import subprocess
import sys

import pytest

from trl_klx.rewards import exact_match, final_number

PROMPTS = ["53331=", "201=", "987="]
ANSWERS = ["13335", "012", "789"]


def test_strings_are_compared_after_stripping() -> None:
    assert exact_match(PROMPTS, [" 13335\n", "021", "789"], answer=ANSWERS) == [1.0, 0.0, 1.0]


def test_a_part_or_an_extension_of_the_answer_earns_nothing() -> None:
    assert exact_match(PROMPTS, ["1333", "0122", ""], answer=ANSWERS) == [0.0, 0.0, 0.0]


def test_leading_zeros_count() -> None:
    assert exact_match(["201="], ["12"], answer=["012"]) == [0.0]


def test_only_the_completion_is_stripped() -> None:
    assert exact_match(["201="], ["012"], answer=["012 "]) == [0.0]


def test_conversational_completions_are_scored_by_their_last_message() -> None:
    completions = [
        [{"role": "assistant", "content": "13335"}],
        [{"role": "assistant", "content": "012"}, {"role": "assistant", "content": "wrong"}],
        [{"role": "assistant", "content": None}],
    ]
    assert exact_match(PROMPTS, completions, answer=ANSWERS) == [1.0, 0.0, 0.0]


def test_rewards_are_floats_and_other_columns_are_accepted() -> None:
    rewards = exact_match(
        prompts=PROMPTS, completions=ANSWERS, completion_ids=[[1]] * 3, answer=ANSWERS, trainer_state=None
    )
    assert [type(reward) for reward in rewards] == [float] * 3


def test_an_answer_that_is_no_string_is_refused() -> None:
    with pytest.raises(TypeError, match="column 'answer' holds 13335 of type int: store the answers as strings"):
        exact_match(["53331="], ["13335"], answer=[13335])


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="zip"):
        exact_match(PROMPTS, ["13335"], answer=ANSWERS)


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("7 + 5 = 12", "12", 1),
        ("7 + 5 = 12. 12 + 1 = 13", "12", 0),  # the last number is the answer
        ("It is 1,200.0.", "1200", 1),
        ("$1,234,567.5", "1234567.5", 1),
        ("1, 2, 345", "345", 1),  # an enumeration, not one number
        ("1234,567", "567", 1),
        ("-5", "-5", 1),
        ("10-5", "5", 1),
        ("5", "-5", 0),
        ("007", "7", 1),
        ("twelve", "12", 0),
        ("", "0", 0),
        ("so 42", "He has 6 * 7 = <<6*7=42>>42. #### 42", 1),
        ("so 42", "#### 1,042", 0),
    ],
)
def test_the_last_number_is_compared_as_a_number(completion: str, answer: str, reward: float) -> None:
    assert final_number(["?"], [completion], answer=[answer]) == [reward]
    message = [{"role": "assistant", "content": completion}]
    assert final_number(prompts=["?"], completions=[message], answer=[answer], other=[1]) == [reward]


def test_an_expected_answer_without_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="column 'answer' holds 'twelve', which is not a number"):
        final_number(["?"], ["12"], answer=["twelve"])


def test_the_module_does_not_import_torch() -> None:
    code = "import sys, trl_klx.rewards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
