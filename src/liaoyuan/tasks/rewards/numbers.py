"""Reading one number as people write it, exactly: as a fraction, never as a float.

Read are digits of any width with thousands separators ("1,234.50"), fractions ("3/4", "(3/4)", "1 3/4", "1(3/4)",
"\\frac{3}{4}"), percents, "2.5 million" and "3万", Chinese numerals ("三百二十", "百分之五", "四分之三"),
a currency before it and a unit after it. An equation is read behind its last "=". Whatever names a second number is
no number.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 200  # characters of a number with all that stands around it
DIGITS_LIMIT = 60
UNIT_WORDS = 6

_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_HAN = "〇零一二两三四五六七八九十百千万亿点"
_CHINESE = f"[{_HAN}]+"
_PLAIN = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:"
    rf"(?P<whole>[0-9]+)\s*(?:\(\s*(?P<up>[0-9]+)\s*/\s*(?P<down>[0-9]+)\s*\)|\s(?P<up2>[0-9]+)\s*/\s*(?P<down2>[0-9]+))"
    rf"|\(\s*(?P<inner>[-+]?)\s*(?P<top>{_NUMBER})\s*/\s*(?P<bottom>{_NUMBER})\s*\)"
    rf"|(?P<over>{_NUMBER})\s*/\s*(?P<under>{_NUMBER})"
    rf"|(?P<number>{_NUMBER})"
    rf")"
)
_PARTS = re.compile(
    rf"(?:(?P<cent>百分之)(?P<share>{_CHINESE}|{_NUMBER})"
    rf"|(?:(?P<whole>{_CHINESE}|[0-9]+)又)?(?P<down>{_CHINESE}|[0-9]+)分之(?P<up>{_CHINESE}|[0-9]+)"
    rf"|(?P<plain>{_CHINESE}))"
)
_SCALE = re.compile(
    r"\s*(?:(thousand|million|billion|trillion)\b|(万亿|百万|千万|万|亿|千(?![米克瓦卡升帕焦])|百(?!分)))"
)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES |= {"百": 100, "千": 1000, "万": 10**4, "百万": 10**6, "千万": 10**7, "亿": 10**8, "万亿": 10**12}
_PERCENT = re.compile(r"\s*(?:%|percent\b|per ?cent\b)", re.IGNORECASE)
_UNIT = re.compile(r"[A-Za-z°'\"·]+\^?[23]?|[\u4e00-\u9fff]+[23]?|[/\-]")
_CURRENCY = re.compile(r"(?:US|HK|A|C)?\$|[€£¥₹]|\b(?:Rs\.?|USD|EUR|RMB|CNY)\s*")
_OTHERWISE = re.compile(
    r"\b(?:or|and|not|nor|to|than|but|either|maybe|perhaps|between|plus|minus)\b|[或和与到至不非、;~?几]|多少|什么|[,，](?![0-9]{3})",
    re.IGNORECASE,
)

_REASON = re.compile(r"\b(?:because|since|as|so|if|when|where|thus|hence)\b|因为|所以|由于|如果", re.IGNORECASE)


@dataclass(frozen=True)
class Number:
    """A number's exact value; percent: it was written with a percent sign, which the value has been divided by."""

    value: Fraction
    percent: bool = False


def read_number(text: str) -> Number | None:
    """Return the number that `text` is, units apart; None if it is none, or more than one."""
    text = plain(text)
    if not text or len(text) > LONGEST:
        return None
    if "=" in text:
        left, _, text = text.rpartition("=")
        if _OTHERWISE.search(left) or _REASON.search(left):
            return None
    text = _CURRENCY.sub("", text.strip(), count=1).strip()
    return _read_plain(text) or _read_chinese(text)


def only_number(sentence: str) -> Number | None:
    """Return the one number that a sentence such as "he has 5 apples left" names in digits; None if it names more."""
    match = re.search(r"[-+]?[$(]*[0-9.]", plain(sentence))
    lead = plain(sentence)[: match.start()] if match else ""
    if not match or _OTHERWISE.search(lead) or _REASON.search(lead):
        return None
    return read_number(plain(sentence)[match.start() :])


def plain(text: str) -> str:
    """Return `text` in one width and without the dressing of LaTeX and Markdown; "\\frac{a}{b}" becomes "(a/b)"."""
    text = re.sub(r"([¼½¾⅐-⅞])", r" \1", text)  # else "3½" were 31/2
    text = re.sub(r"([⁰¹²³⁴-⁹])", r"^\1", text)  # else "10²" were 102
    text = unicodedata.normalize("NFKC", text).translate(_DASHES)
    for pattern, new in _DRESSING:
        text = pattern.sub(new, text)
    return text.strip().rstrip(".。").strip()


_DASHES = str.maketrans({"−": "-", "–": "-", "—": "-", "⁄": "/", "∕": "/", "×": "*", "÷": "/", "\u00a0": " "})
_DRESSING = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\(?:left|right|displaystyle|,|!)", ""),
        (r"\\[;: ]", " "),
        (r"\\(?:text|mathrm|textbf|mathbf|mbox|textit|operatorname)\s*\{([^{}]*)\}", r"\1"),
        (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1/\2)"),
        (r"\\[dt]?frac\s*([0-9])\s*([0-9])", r"(\1/\2)"),
        (r"\\%", "%"),
        (r"\\\$", "$"),
        (r"\{,\}", ","),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree", "°"),
        (r"\\(?:times|cdot)", "*"),
        (r"\\div", "/"),
        (r"(?<![0-9)])\*\*|\*\*(?![0-9(])|(?<!\w)__|__(?!\w)", ""),
        (r"`|\\[()\[\]]|(?<![A-Z])\$", " "),
        (r"^~+|^\(([^()]*)\)$", r"\1"),
        (r"\s+", " "),
    )
)


def _read_plain(text: str) -> Number | None:
    match = _PLAIN.match(text)
    if not match or len(match[0]) > DIGITS_LIMIT:
        return None
    value = _value(match)
    return None if value is None else _with_rest(value, text[match.end() :])


def _value(match: re.Match[str]) -> Fraction | None:
    """Return the value of a match of `_PLAIN`; None for a fraction of nought."""
    found = match.groupdict()
    whole, up, down = found["whole"], found["up"] or found["up2"], found["down"] or found["down2"]
    top, bottom = found["top"] or found["over"], found["bottom"] or found["under"]
    try:
        if whole is not None:
            value = int(whole) + Fraction(int(up), int(down))
        elif top is not None:
            value = _exact(top) / _exact(bottom)
        else:
            value = _exact(found["number"])
    except ZeroDivisionError:
        return None
    return -value if (found["sign"] == "-") != (found["inner"] == "-") else value


def _exact(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def _with_rest(value: Fraction, rest: str) -> Number | None:
    """Return the number with what stands behind it, a scale, a percent sign, a unit; None if that is something else."""
    if scale := _SCALE.match(rest):
        value, rest = value * _SCALES[scale[1] or scale[2]], rest[scale.end() :]
    percent = _PERCENT.match(rest)
    rest = (rest[percent.end() :] if percent else rest).strip()
    rest = rest[1:-1].strip() if rest.startswith("(") and rest.endswith(")") else rest
    if not _is_unit(rest):
        return None
    return Number(value / 100, True) if percent else Number(value)


def _is_unit(text: str) -> bool:
    """Whether `text` is a unit or a few words: no digits but exponents, and nothing that opens an alternative."""
    if _OTHERWISE.search(text) or re.search(f"[{_HAN}]", text.replace("千", "").replace("百", "")):
        return False
    words = _UNIT.findall(text)
    return len(words) <= UNIT_WORDS and not _UNIT.sub("", text).strip()


def _read_chinese(text: str) -> Number | None:
    sign, text = (-1, text[1:]) if text[:1] in ("负", "-") else (1, text)
    match = _PARTS.match(text)
    if not match or len(match[0]) > DIGITS_LIMIT:
        return None
    names = ("share",) if match["cent"] else ("up", "down") if match["down"] else ("plain",)
    values = [_count(match[name]) for name in names]
    whole = _count(match["whole"]) if match["whole"] else Fraction(0)
    if None in values or whole is None or (match["down"] and not values[1]):
        return None
    first = values[0] or Fraction(0)
    if match["cent"]:
        return Number(sign * first / 100, True) if _is_unit(text[match.end() :]) else None
    value = whole + first / values[1] if match["down"] and values[1] else first
    return _with_rest(sign * value, text[match.end() :])


_ONES = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_TENS = {"十": 10, "百": 100, "千": 1000}


def _count(text: str) -> Fraction | None:
    """Return the value of digits or of a Chinese numeral, such as 三千零五十 or 三点一四; None if it is none."""
    if re.fullmatch(_NUMBER, text):
        return _exact(text)
    whole, point, decimals = text.partition("点")
    if point and (not decimals or any(character not in _ONES for character in decimals)):
        return None
    value = _whole(whole)
    if value is None:
        return None
    return value + Fraction(int("0" + "".join(str(_ONES[one]) for one in decimals)), 10 ** len(decimals))


def _whole(text: str) -> int | None:
    if not text:
        return None
    if all(character in _ONES for character in text):  # 二〇二四, or one digit alone
        return int("".join(str(_ONES[character]) for character in text)) if "两" not in text or text == "两" else None
    if len(text) > 1 and text[-1] in _ONES and text[-2] in "百千万亿":
        return None  # 三千五 is 3500 in speech
    total = group = digit = 0
    for place, character in enumerate(text):
        if character in _ONES:
            if digit:
                return None
            digit = _ONES[character]
        elif character in _TENS and (digit or (character == "十" and (place == 0 or text[place - 1] in "零万亿"))):
            group, digit = group + (digit or 1) * _TENS[character], 0
        elif character == "万" and group + digit and total % 10**8 == 0:
            total, group, digit = total + (group + digit) * 10**4, 0, 0
        elif character == "亿" and total + group + digit:
            total, group, digit = (total + group + digit) * 10**8, 0, 0
        else:
            return None
    return total + group + digit
