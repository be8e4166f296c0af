"""Rules that tell whether an answer in free words is the expected one."""

from __future__ import annotations

import pytest

from mmalign.core.io.answer_matching import match_answer


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [
        # yes and no
        ("yes", "Yes, the man is running.", True),
        ("Yes, the man is running.", "yes", True),
        ("YES!", "yes", True),
        ("Answer: yes", "yes", True),
        ("The answer is no.", "No", True),
        ("The man is running.", "Yes, the man is running.", True),
        ("No, the man is walking.", "yes", False),
        ("no", "Yes, the man is running.", False),
        ("Yes, a woman sings.", "Yes, the man is running.", None),
        ("He might be.", "yes", None),
        ("The man is not running.", "no", None),
        ("yes", "The man is running.", None),
        ("Yesterday", "yes", None),
        # letters of options
        ("B", "B. to the left", True),
        ("(b)", "B. to the left", True),
        ("b) to the left", "B. to the left", True),
        ("The correct answer is B", "B. to the left", True),
        ("Option B: to the left", "(B) to the left", True),
        ("To the left.", "B. to the left", True),
        ("It moves to the left", "B. to the left", True),
        ("A", "B. to the left", False),
        ("A. to the right", "B", False),
        ("to the right", "B. to the left", False),
        ("A ball moves to the left", "B. to the left", True),  # "A" is an article here
        ("A. to the left", "B. to the left", None),  # letter and text disagree
        ("to the left", "B", None),
        ("B", "Caption B: The ball falls.", True),
        ("the ball falls", "Caption B: The ball falls.", True),
        ("Caption A", "Caption B: The ball falls.", False),
        ("Sentence B", "Sentence A", False),
        ("Sentence A", "Sentence A: The ball falls.", True),
        ("Option 2", "Option 1: The ball falls.", False),
        ("Option 1", "Option 1: The ball falls.", True),
        ("The answer is a cat", "A. a dog", False),  # an article
        ("The answer is a cat", "The answer is a dog", False),
        ("Caption: A dog jumps.", "Caption: A man is running.", False),
        ("The answer is a cat sitting on a mat", "B. a cat sitting", True),
        ("The answer is a man who runs left.", "B. A man runs left", None),
        ("The answer is 3 balls", "B. 3", True),
        ("The answer is A because it turns.", "A. it turns", True),
        ("The answer is A because it falls.", "B. it turns", None),
        ("The answer is B because it falls.", "B. it turns", True),
        # numbers
        ("There are not three balls", "3", None),
        ("It cannot be red", "red", None),
        ("from left to right", "left", None),
        ("There are three balls.", "3", True),
        ("3", "three", True),
        ("Three.", "Three", True),
        ("4", "3", False),
        ("3 or 4", "3", None),
        ("several", "3", None),
        ("2.5", "2", False),
        # other words
        ("A red circle.", "the Red circle", True),
        ("It is a red circle.", "red circle", True),
        ("a blue circle", "red circle", False),
        ("circle", "red circle", None),
        ("It isn't a red circle.", "red circle", None),
        ("red circle and then a blue one", "red circle", None),
        ("running</s>", "Running.", True),
        ("", "red circle", False),
        ("!", "red circle", False),
        ("red", "", None),
    ],
)
def test_match_answer(given: str, expected: str, right: bool | None) -> None:
    assert match_answer(given, expected) is right
