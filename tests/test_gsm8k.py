"""GSM8K's rows as prompts, and the reward that compares final numbers."""

import pytest
from datasets import Dataset, DatasetDict

from trl_klx.rewards import final_number
from trl_klx.run.recipe.arguments import BadInput
from trl_klx.run.sources.data import prepare_rows
from trl_klx.tasks.gsm8k import gsm8k_prompts

ROW = {"question": "How many?", "answer": "She has <<3*4=12>>12 of 1,000.\n#### 1,012"}


def test_a_row_becomes_a_prompt_and_a_number() -> None:
    row = gsm8k_prompts(ROW)
    assert set(row) == {"prompt", "answer"}
    assert row["answer"] == "1012"
    (message,) = row["prompt"]
    assert message["role"] == "user"
    assert message["content"].startswith("How many?\n")
    assert "####" in message["content"]


def test_a_row_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="has no ####"):
        gsm8k_prompts({"question": "?", "answer": "12"})


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("The answer is 42.", "42", 1.0),
        ("It is 42, as 6 * 7 = 42", "42", 1.0),
        ("#### 1,234", "1234", 1.0),
        ("1234", "1,234", 1.0),
        ("That makes $1,234.50 in all", "1234.5", 1.0),
        ("#### 18.00", "18", 1.0),
        ("#### -5", "-5", 1.0),
        ("#### 5", "-5", 0.0),
        ("-5", "5", 0.0),
        ("\u22125", "-5", 1.0),
        ("#### $-5", "-5", 1.0),
        ("between 10-12", "12", 1.0),
        ("between 10-12", "-12", 0.0),
        ("0.5", "5", 0.0),
        ("#### .5", "0.5", 1.0),
        (r"So \boxed{7}, not 8", "7", 1.0),
        (r"First \boxed{3}, then \boxed{4}", "4", 1.0),
        (r"\boxed{\text{none}}, 7", "7", 1.0),
        (r"\boxed{none} 7", "7", 0.0),
        (r"\boxed{1/2}", "2", 0.0),
        ("#### 7\nNow the next question has 9.", "7", 1.0),
        ("7 or 8", "7", 0.0),
        ("#### unknown, though 7", "8", 0.0),
        ("no number", "7", 0.0),
        ("", "7", 0.0),
        ("1,2,3", "3", 1.0),
        ("12,34", "34", 1.0),
        ("x2 is a name", "2", 0.0),
        ("#### 42%", "42", 1.0),
        ([{"role": "assistant", "content": "#### 42"}], "42", 1.0),
        ([{"role": "assistant", "content": None}], "42", 0.0),
    ],
)
def test_final_number(completion: object, answer: str, reward: float) -> None:
    assert final_number(["p"], [completion], answer=[answer]) == [reward]  # type: ignore[list-item]


def test_what_the_dataset_must_hold() -> None:
    with pytest.raises(ValueError, match="is not a number"):
        final_number(["p"], ["1"], answer=["none"])
    with pytest.raises(ValueError, match="zip"):
        final_number(["p"], ["1"], answer=[])


def test_the_real_format_end_to_end() -> None:
    row = gsm8k_prompts(ROW)
    assert final_number([row["prompt"]] * 2, [ROW["answer"], "1,013"], answer=[row["answer"]] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("streaming", [False, True])
def test_prepared_rows_take_the_place_of_the_datasets_own(streaming: bool) -> None:
    """Every split, every row, and no column of before is left."""
    rows = Dataset.from_list([{**ROW, "level": i} for i in range(3)])
    given = DatasetDict({"train": rows.to_iterable_dataset() if streaming else rows, "test": rows})
    prepared = prepare_rows(given, "trl_klx.tasks.gsm8k.gsm8k_prompts")
    assert set(prepared) == {"train", "test"}
    for split in prepared.values():
        assert [set(row) for row in split] == [{"prompt", "answer"}] * 3
    assert prepare_rows(given, None) is given
    with pytest.raises(BadInput, match=r"dataset_prepare='trl_klx\.tasks\.gsm8k\.nothing' cannot be imported"):
        prepare_rows(given, "trl_klx.tasks.gsm8k.nothing")
