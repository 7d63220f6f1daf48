"""Dates: leap years, days between two dates, the date some days later, and days of the week.

The calendar is the Gregorian one. Its arithmetic is written out here, as the thoughts show it.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from liaoyuan.tasks.generated import Wording, Written, phrase
from liaoyuan.tasks.problem import Problem, Score

YEARS = range(1901, 2101)
KINDS: tuple["Kind", ...] = ("later", "leap", "span", "weekday", "years", "any_weekday")  # level by level
SPAN = range(8, 25)  # years in which leap years are counted
LATER = range(10, 61)  # days after a date
FARTHEST = 6  # years between two dates
MONTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
BEFORE = tuple(sum(MONTHS[:month]) for month in range(12))  # days of a plain year before each month
WEEKDAYS = {
    "compact": ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"),
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "zh": ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"),
}
MONTH_NAMES = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
NUMBER = re.compile(r"0|[1-9][0-9]{0,5}")
DATE = re.compile(r"([0-9]{4})(?:-([0-9]{2})-([0-9]{2})|年([0-9]{1,2})月([0-9]{1,2})日)")
WEEKDAY = re.compile(r"(?:星期|周|礼拜)([一二三四五六日天])|([A-Za-z]{3,9})")
PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "leap": {
        "compact": ("leap {first}..{last}=?",),
        "en": (
            "How many leap years are there from {first} to {last}, both included?",
            "Count the leap years between {first} and {last}, these two years included.",
        ),
        "zh": (
            "从{first}年到{last}年（含这两年）有多少个闰年？",
            "{first}年至{last}年之间共有几个闰年？首尾两年也算。",
        ),
    },
    "later": {
        "compact": ("{first}+{last}d=?",),
        "en": (
            "Which date is {last} days after {first}? Answer as YYYY-MM-DD.",
            "Something begins on {first} and ends {last} days later. When is that? Answer as YYYY-MM-DD.",
        ),
        "zh": ("{first}之后第{last}天是哪一天？", "一件事从{first}开始，{last}天以后结束，结束那天是几年几月几日？"),
    },
    "span": {
        "compact": ("{last}-{first}=?d",),
        "en": (
            "How many days is it from {first} to {last}?",
            "Today is {first}. In how many days will it be {last}?",
        ),
        "zh": ("从{first}到{last}相隔多少天？", "今天是{first}，再过多少天是{last}？"),
    },
    "weekday": {
        "compact": ("{first} {name},{last}=?",),
        "en": (
            "{first} is a {name}. Which day of the week is {last}?",
            "If {first} falls on a {name}, on which day of the week does {last} fall?",
        ),
        "zh": ("{first}是{name}，{last}是星期几？", "已知{first}是{name}，求{last}是星期几。"),
    },
    "any_weekday": {
        "compact": ("{first} day=?",),
        "en": ("Which day of the week is {first}?", "On which day of the week does {first} fall?"),
        "zh": ("{first}是星期几？", "请算出{first}是星期几。"),
    },
}

Kind = Literal["later", "leap", "span", "weekday", "years", "any_weekday"]
Day = tuple[int, int, int]  # year, month, day


class Dates:
    """By level: "2024-02-27+40d=?", "leap 1896..1910=?", "2024-05-03-2024-02-27=?d", the weekday of such a date,
    days between dates of different years, and "2024-07-04 day=?" for the weekday of any date.

    The answer is a date (2024-04-07), a number or a weekday (Thu); the thought adds up days, in which
    it is known how many of a year are before each month.
    """

    name = "dates"
    levels = range(1, len(KINDS) + 1)

    def make(self, chance: random.Random, level: int) -> "Question":
        kind = KINDS[level - 1]
        if kind == "leap":
            first = chance.randrange(1880, 2090)
            return Question(kind, (first, 1, 1), (first + chance.choice(SPAN), 1, 1))
        year = chance.choice(YEARS)
        if kind == "years":
            return Question(kind, _day(chance, year), _day(chance, year + chance.randint(1, FARTHEST)))
        one, other = sorted((_day(chance, year), _day(chance, year)))
        if kind == "later":
            return Question(kind, one, days=chance.choice(LATER))
        return Question(kind, one, one if kind == "any_weekday" else other)

    def check(self, problem: Problem, text: str) -> Score:
        found, right = _read(text.strip()), _read(problem.answer)
        if found is None:
            return Score(0.0, None, "no number, date or day of the week")
        return Score(float(found == right), found, "" if found == right else f"not {problem.answer}")


def is_leap(year: int) -> bool:
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def days_of(year: int, month: int) -> int:
    return 29 if month == 2 and is_leap(year) else MONTHS[month - 1]


def day_of_year(day: Day) -> int:
    return BEFORE[day[1] - 1] + day[2] + (day[1] > 2 and is_leap(day[0]))


def _day(chance: random.Random, year: int) -> Day:
    month = chance.randint(1, 12)
    return year, month, chance.randint(1, days_of(year, month))


def _read(text: str) -> str | None:
    """Return a number, a date as YYYY-MM-DD or a weekday as "Mon"; None for all else."""
    if NUMBER.fullmatch(text):
        return text
    if date := DATE.fullmatch(text):
        year, *rest = (int(part) for part in date.groups() if part)
        return f"{year:04d}-{rest[0]:02d}-{rest[1]:02d}"
    if not (day := WEEKDAY.fullmatch(text)):
        return None
    if day[1]:
        return WEEKDAYS["compact"]["一二三四五六日".index(day[1].replace("天", "日"))]
    names = {name.lower(): place for kind in ("compact", "en") for place, name in enumerate(WEEKDAYS[kind])}
    place = names.get(day[2].lower())
    return None if place is None else WEEKDAYS["compact"][place]


@dataclass(frozen=True)
class Question:
    """What is asked of one date, or of two; `days` is what is added."""

    kind: Kind
    first: Day
    last: Day = (0, 0, 0)
    days: int = 0

    @property
    def content(self) -> str:
        return f"{self.kind} {_iso(self.first)} {self.days or _iso(self.last)}"

    def written(self, wording: Wording, chance: random.Random) -> Written:
        answer, steps = self._solution()
        kind = "span" if self.kind == "years" else self.kind
        said = {"first": _said(self.first, wording), "last": self.days or _said(self.last, wording)}
        if kind == "leap":
            said = {"first": self.first[0], "last": self.last[0]}
        names = WEEKDAYS[wording]
        name = names[weekday(self.first)] if kind == "weekday" else ""
        question = phrase(PHRASES[kind], wording, chance, **said, name=name)
        if kind in ("weekday", "any_weekday"):
            answer = names[int(answer)]
        elif kind == "later" and wording == "zh":
            answer = _said(_parts(answer), "zh")
        return Written(question, answer, tuple(steps))

    def _solution(self) -> tuple[str, list[str]]:
        """Return the answer (a weekday as its number from Monday, 0) and the steps to it."""
        if self.kind == "leap":
            return _leap_years(self.first[0], self.last[0])
        if self.kind == "later":
            return _later(self.first, self.days)
        if self.kind == "any_weekday":
            return _weekday_steps(self.first)
        days, steps = _span(self.first, self.last)
        if self.kind != "weekday":
            return str(days), steps
        known = weekday(self.first)
        rest = days % 7
        return str((known + rest) % 7), [*steps, f"{days}%7={rest};", f"{WEEKDAYS['compact'][known]}+{rest};"]


def weekday(day: Day) -> int:
    """Return the weekday of a date from 1901 on, 0 for Monday: 1 January 1900 was one, and 1900 no leap year."""
    return (day[0] - 1900 + (day[0] - 1901) // 4 + day_of_year(day) - 1) % 7


def _leap_years(first: int, last: int) -> tuple[str, list[str]]:
    fourth = [year for year in range(first, last + 1) if year % 4 == 0]
    steps = [f"{year}," if is_leap(year) else f"{year}!," for year in fourth]
    return str(sum(map(is_leap, fourth))), steps


def _later(day: Day, days: int) -> tuple[str, list[str]]:
    year, month, date = day
    total = date + days
    steps = [f"{date}+{days}={total};"]
    while total > (size := days_of(year, month)):
        steps.append(f"{total}-{size}={total - size};")
        total -= size
        year, month = (year + 1, 1) if month == 12 else (year, month + 1)
    return _iso((year, month, total)), steps


def _span(first: Day, last: Day) -> tuple[int, list[str]]:
    """Return the days between two dates: the years, and the day of its year that the last and the first one is."""
    years = [366 if is_leap(year) else 365 for year in range(first[0], last[0])]
    steps = [*_added(years), _day_step(first), _day_step(last)]
    days, known = day_of_year(last), sum(years)
    if known:
        steps.append(f"{known}+{days}={known + days};")
    days += known
    return days - day_of_year(first), [*steps, f"{days}-{day_of_year(first)}={days - day_of_year(first)};"]


def _weekday_steps(day: Day) -> tuple[str, list[str]]:
    """Add years since 1900, leap days in them and days of this year so far, modulo 7: day 1 of 1900 was a Monday."""
    numbers = [day_of_year(day) - 1, day[0] - 1900, (day[0] - 1901) // 4]
    total = sum(numbers)
    return str(total % 7), [_day_step(day), *_added(numbers), f"{total}%7={total % 7};"]


def _day_step(day: Day) -> str:
    before = day_of_year(day) - day[2]
    return f"{before}+{day[2]}={before + day[2]};"


def _added(numbers: list[int]) -> Iterator[str]:
    total = 0
    for place, number in enumerate(numbers):
        yield f"{total}+{number}={total + number};" if place else f"{number};"
        total += number


def _iso(day: Day) -> str:
    return f"{day[0]:04d}-{day[1]:02d}-{day[2]:02d}"


def _parts(iso: str) -> Day:
    year, month, date = map(int, iso.split("-"))
    return year, month, date


def _said(day: Day, wording: Wording) -> str:
    if wording == "compact":
        return _iso(day)
    year, month, date = day
    return f"{year}年{month}月{date}日" if wording == "zh" else f"{date} {MONTH_NAMES[month - 1]} {year}"
