"""A problem is the same in every wording: same content and split, its facts in the sentence, a right answer."""

import datetime
import re

import pytest

from liaoyuan.tasks import TASKS, Problem, find_task, split_of
from tests.tasks.test_tasks import HOSTILE, SPLITS

CHINESE = re.compile(r"[\u4e00-\u9fff]")
MONTHS = [datetime.date(2000, month, 1).strftime("%B") for month in range(1, 13)]
NAMES = {"Ann": "A", "Bob": "B", "Cid": "C", "Dora": "D", "Eve": "E", "Finn": "F"}
CLUES = {
    "<": r"(\w+) is somewhere to the left of (\w+)\.",
    "|": r"(\w+) is directly to the left of (\w+)\.",
    "&": r"(\w+) and (\w+) are neighbours\.",
    "!": r"(\w+) and (\w+) are not neighbours\.",
    "=": r"(\w+) is number (\d) from the left\.",
    "^": r"(\w+) is not number (\d) from the left\.",
}
CHINESE_CLUES = {
    "<": r"([甲乙丙丁戊己])在([甲乙丙丁戊己])的左边。",
    "|": r"([甲乙丙丁戊己])紧挨着([甲乙丙丁戊己])，在\w的左边。",
    "&": r"([甲乙丙丁戊己])和([甲乙丙丁戊己])相邻。",
    "!": r"([甲乙丙丁戊己])和([甲乙丙丁戊己])不相邻。",
    "=": r"([甲乙丙丁戊己])在左起第(\d)个位置。",
    "^": r"([甲乙丙丁戊己])不在左起第(\d)个位置。",
}
WORDS = {
    "+": r"“(\w+) tells the truth\.”",
    "-": r"“(\w+) lies\.”",
    "=": r"“(\w+) and (\w+) are of the same kind\.”",
    "/": r"“(\w+) and (\w+) are of different kinds\.”",
    "#": r"“The number of liars among us is (\d)\.”",
}
CHINESE_WORDS = {
    "+": r"“([甲乙丙丁戊己])说真话。”",
    "-": r"“([甲乙丙丁戊己])说假话。”",
    "=": r"“([甲乙丙丁戊己])和([甲乙丙丁戊己])是同一种人。”",
    "/": r"“([甲乙丙丁戊己])和([甲乙丙丁戊己])不是同一种人。”",
    "#": r"“我们当中恰好有(\d)个人说假话。”",
}


def problems(name: str, count: int = 40) -> list[tuple[Problem, Problem]]:
    """Return the same problems in the compact notation and in the wording of the task `name`."""
    plain, worded = TASKS[name.partition("-")[0]], find_task(name)
    places = [(index, plain.levels[index % len(plain.levels)]) for index in range(count)]
    return [(plain.problem(4, *place), worded.problem(4, *place)) for place in places]


@pytest.mark.parametrize("wording", ["en", "zh"])
@pytest.mark.parametrize("name", TASKS)
class TestEveryTaskInWords:
    def test_it_is_the_same_problem_in_the_same_split(self, name: str, wording: str) -> None:
        for plain, worded in problems(f"{name}-{wording}"):
            assert (worded.key, worded.level) == (plain.key, plain.level) and worded.question != plain.question
            assert worded.task == f"{name}-{wording}"
            assert bool(CHINESE.search(worded.question)) == (wording == "zh") and "{" not in worded.question
        for split in SPLITS:
            assert split_of(find_task(f"{name}-{wording}").problem(1, 1, TASKS[name].levels[1], split).key) == split

    def test_several_sentences_ask_it(self, name: str, wording: str) -> None:
        common = [
            set(re.findall(r"[A-Za-z]{3,}|[\u4e00-\u9fff]", worded.question))
            for _, worded in problems(f"{name}-{wording}")
        ]
        assert len({frozenset(words) for words in common}) > 1

    def test_its_answer_is_right_and_hostile_text_is_wrong(self, name: str, wording: str) -> None:
        task = find_task(f"{name}-{wording}")
        for _, problem in problems(task.name, 12):
            assert task.check(problem, f" {problem.answer}\n").is_right
            for text in [*HOSTILE, f"{problem.answer} {problem.answer}", f"it is {problem.answer}", problem.question]:
                assert task.check(problem, text).value == 0.0, text

    def test_every_number_of_the_problem_is_in_the_sentence(self, name: str, wording: str) -> None:
        for plain, worded in problems(f"{name}-{wording}"):
            if name not in ("liars", "ordering", "maze"):
                said = list(map(int, re.findall(r"\d+", worded.question)))
                wanted = set(map(int, re.findall(r"\d+", _plain_months(plain.question, wording))))
                assert wanted <= {*said, 10}, (plain, worded)  # 10: the modulus, which words say in their own way


def _plain_months(question: str, wording: str) -> str:
    return re.sub(r"(\d{4})-\d\d-(\d\d)", r"\1 \2", question) if wording == "en" else question


def test_dates_are_written_as_people_write_them() -> None:
    for plain, worded in problems("dates-en"):
        said = re.findall(rf"(\d+) ({'|'.join(MONTHS)}) (\d+)", worded.question)
        iso = [f"{year}-{MONTHS.index(month) + 1:02d}-{int(day):02d}" for day, month, year in said]
        assert sorted(iso) == sorted(re.findall(r"\d{4}-\d\d-\d\d", plain.question))


@pytest.mark.parametrize(
    ("name", "form"), [("modular-en", r"(Add|Subtract|Multiply by) (\d)"), ("modular-zh", r"(加|减|乘)(\d)")]
)
def test_chains_are_told_step_by_step(name: str, form: str) -> None:
    signs = dict(zip(("add", "subtract", "multiply by", *"加减乘"), "+-*+-*", strict=True))
    for plain, worded in problems(name):
        told = re.findall(form, worded.question, re.IGNORECASE)
        assert "".join(signs[verb.lower()] + digit for verb, digit in told) == plain.question.split(" ")[0][1:]


def test_mazes_are_drawn_line_by_line() -> None:
    for wording in ("en", "zh"):
        for plain, worded in problems(f"maze-{wording}"):
            lines = [line for line in worded.question.split("\n") if re.fullmatch(r"[#.SE]+", line)]
            assert "/".join(lines) == plain.question


@pytest.mark.parametrize(
    ("name", "forms"),
    [("ordering-en", CLUES), ("ordering-zh", CHINESE_CLUES), ("liars-en", WORDS), ("liars-zh", CHINESE_WORDS)],
)
def test_puzzles_say_in_words_what_their_notation_says(name: str, forms: dict[str, str]) -> None:
    letters = NAMES | dict(zip("甲乙丙丁戊己", "ABCDEF", strict=True))
    for plain, worded in problems(name):
        found = []
        for kind, form in forms.items():
            for match in re.finditer(form, worded.question):
                one, *other = (letters.get(word, word) for word in match.groups())
                found.append(f"#{one}" if kind == "#" else f"{one}{kind}{''.join(other)}")
        notation = plain.question.split(": ")[-1].split(",")
        assert sorted(found) == sorted(clue.split(":")[-1] for clue in notation), (plain, worded)


ZEBRA = {
    "en": (
        {
            "=": r"(.+) lives in house (\d)|(.+) is (?!not )(.+)",
            "^": r"(.+) does not live in house (\d)|(.+) is not (.+)",
            "|": r"(.+) lives directly to the left of (.+)",
            "&": r"(.+) and (.+) are neighbours",
            "<": r"(.+) lives somewhere to the left of (.+)",
        },
        "Ann Bob Cid Dora cat dog fish owl tea milk juice water",
    ),
    "zh": (
        {
            "=": r"(.+)(?<!不)住在(\d)号房子|(.+)就是(.+)",
            "^": r"(.+)不住在(\d)号房子|(.+)不是(.+)",
            "|": r"(.+)住在(.+)左边的隔壁",
            "&": r"(.+)和(.+)是邻居",
            "<": r"(.+)住在(.+)的左边",
        },
        "甲 乙 丙 丁 猫 狗 鱼 鸟 茶 奶 水 酒",
    ),
}


@pytest.mark.parametrize("wording", ZEBRA)
def test_zebra_puzzles_say_in_words_what_their_notation_says(wording: str) -> None:
    forms, names = ZEBRA[wording]
    letters = dict(zip(names.split(), "ABCDabcdwxyz", strict=True))
    for plain, worded in problems(f"zebra-{wording}"):
        sentences = re.split(r"[.。]\s*", worded.question)
        found = []
        for sentence in sentences:
            for kind, form in forms.items():
                if match := re.fullmatch(form, sentence):
                    pair = [one for one in match.groups() if one]
                    things = [re.sub(r"(?i)the (owner|drinker) of (the )?|^养|^喝|的人$", "", thing) for thing in pair]
                    if all(thing in letters or thing.isdigit() for thing in things):
                        found.append(kind.join(letters.get(thing, thing) for thing in things))
        assert sorted(found) == sorted(plain.question.split(": ")[1].split(",")), (plain, worded)


def test_digits_of_full_width_are_for_chinese_alone() -> None:
    wide = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
    for name in TASKS:
        for plain, worded in problems(f"{name}-zh", 6):
            chinese = find_task(worded.task)
            assert chinese.check(worded, worded.answer.translate(wide)).is_right
            for other in (name, f"{name}-en"):
                problem = find_task(other).problem(4, 0, plain.level)
                if problem.answer.isascii() and problem.answer.translate(wide) != problem.answer:
                    assert find_task(other).check(problem, problem.answer.translate(wide)).value == 0.0


@pytest.mark.parametrize(
    ("name", "answer", "right", "wrong"),
    [
        (
            "division-en",
            "12 remainder 3",
            ["12 r 3", "12r3", "12余3"],
            ["12 remainder 03", "12", "12.3", "remainder 3"],
        ),
        ("dates-en", "Friday", ["friday", "Fri", "星期五", "周五"], ["Frida", "Freitag", "5", "Friday!"]),
        ("dates-zh", "星期日", ["周日", "星期天", "礼拜天", "Sunday"], ["日", "星期七", "周六"]),
        ("dates-zh", "2024年4月7日", ["2024-04-07"], ["2024-4-7", "2024年4月8日", "4月7日", "2024-04-07T00:00"]),
        ("liars-zh", "真假真", ["TLT", "真、假、真", "真 假 真"], ["真假", "真假假", "甲丙"]),
        ("ordering-en", "BADC", ["B, A, D, C", "B A D C", "乙甲丁丙"], ["BAD", "ABCD", "Bob Ann Dora Cid", "BADCC"]),
        (
            "zebra-en",
            "Ac Bd Cf",
            ["Ac, Bd, Cf", "AcBdCf"],
            ["Ac Bd", "Ac Cf Bd", "Ann cat Bob dog Cid fish", "ac bd cf"],
        ),
        (
            "zebra-zh",
            "甲猫茶 乙狗奶",
            ["甲猫茶，乙狗奶", "甲猫茶、乙狗奶"],
            ["甲猫 乙狗", "乙狗奶 甲猫茶", "甲猫茶。乙狗奶"],
        ),
        ("sorting-en", "1, 2, 10", ["1 2 10", "1,2,10"], ["1, 10, 2", "1, 2", "1 2 010", "1,,2,10"]),
    ],
)
def test_other_ways_to_write_an_answer(name: str, answer: str, right: list[str], wrong: list[str]) -> None:
    problem = Problem(name, "?", answer, "", 1, "sorting:10 1 2")
    for text in [answer, *right]:
        assert find_task(name).check(problem, text).is_right, text
    for text in wrong:
        assert find_task(name).check(problem, text).value == 0.0, text


def test_amounts_are_read_with_their_units_and_without() -> None:
    plain = Problem("units-en", "?", "345", "", 2, "units:3m45cm=?cm")
    mixed = Problem("units-en", "?", "2 hours 5 minutes", "", 4, "units:125min=?h?min")
    check = find_task("units-en").check
    for text in ("345", "345cm", "345 cm", "345 centimetres"):
        assert check(plain, text).is_right, text
    for text in ("345 mm", "345 metres", "3m45cm", "345,", "345 and", "0345"):
        assert check(plain, text).value == 0.0, text
    for text in ("2h5min", "2 hours and 5 minutes", "2 hours, 5 minutes", "2小时5分"):
        assert check(mixed, text).is_right, text
    for text in ("2h65min", "1h65min", "125min", "2 5", "2 hours", "5 minutes 2 hours", "2h5min0s"):
        assert check(mixed, text).value == 0.0, text
