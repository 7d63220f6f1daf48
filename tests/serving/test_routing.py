"""Requests that begin alike go to the replica that has their beginning, unless it is much busier than others."""

import hypothesis.strategies as st
from hypothesis import given

from liaoyuan.serving.routing import MOST_PIECES, PIECE, SLACK, Routes, prompt_pieces
from liaoyuan.serving.totals import total_health, total_metrics

LONG = "You answer questions about the village of Dorf. " * 40


def chat(question: str, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "system", "content": LONG}, {"role": "user", "content": question}], **more}


def send(routes: Routes, body: object, busy: dict[int, int]) -> int:
    pieces = prompt_pieces(body)
    number = routes.choose(pieces, busy)
    routes.given(pieces, number)
    return number


def test_a_prompt_follows_its_beginning_until_that_replica_is_much_busier() -> None:
    routes = Routes()
    home = send(routes, chat("Who lives there?"), {0: 1, 1: 0, 2: 1})
    assert home == 1
    assert send(routes, chat("Since when?", temperature=0.3), {0: 0, 1: SLACK, 2: 0}) == home
    assert send(routes, chat("And why?"), {0: 2, 1: SLACK + 1, 2: 0}) == 2
    assert send(routes, {"prompt": "something else " * 100}, {0: 0, 1: 1, 2: 1}) == 0


def test_equal_texts_share_nothing_under_another_model_or_salt() -> None:
    one, other, salted = (prompt_pieces(chat("?", **more)) for more in ({}, {"model": "m"}, {"cache_salt": "s"}))
    assert len(one) > 5 and not set(one) & set(other) and not set(one) & set(salted)


def test_a_new_replica_has_nothing() -> None:
    routes = Routes()
    home = send(routes, chat("Who?"), {0: 0, 1: 0})
    routes.forget(home)
    assert send(routes, chat("Who?"), {home: 1, 1 - home: 0}) == 1 - home


@given(
    st.recursive(
        st.none() | st.booleans() | st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_anything_has_pieces(value: object) -> None:
    assert len(prompt_pieces(value)) <= MOST_PIECES
    assert prompt_pieces({"prompt": value, "messages": value}) == prompt_pieces({"messages": value, "prompt": value})


def test_pieces_stand_for_all_that_is_before_them() -> None:
    text = "a" * PIECE + "b" * PIECE + "c" * PIECE
    first, second = prompt_pieces({"prompt": text}), prompt_pieces({"prompt": "x" + text[1:]})
    assert len(first) == len(second) == 3 and not set(first) & set(second)
    assert prompt_pieces({"prompt": text[: 2 * PIECE + 1]}) == first[:2]


def test_metrics_are_added_up() -> None:
    head = "# HELP a_total Things.\n# TYPE a_total counter\n"
    one = head + 'a_total{endpoint="/v1"} 2.0\n# TYPE x_ratio gauge\nx_ratio 0.5\n'
    other = head + 'a_total{endpoint="/v1"} 3\na_total{endpoint="/b"} 1\n'
    other += "# TYPE x_ratio gauge\nx_ratio 0.25\n# TYPE w_version gauge\nw_version 4\n"
    one += "# TYPE n_max counter\nn_max 7\n# TYPE n_per_decode gauge\nn_per_decode 3\n"
    other += "n_max 9\nn_per_decode 5\n"
    assert total_metrics([one, other]).splitlines() == [
        "# HELP a_total Things.",
        "# TYPE a_total counter",
        'a_total{endpoint="/v1"} 5',
        'a_total{endpoint="/b"} 1',
        "# TYPE x_ratio gauge",
        "x_ratio 0.375",
        "# TYPE n_max counter",
        "n_max 9",
        "# TYPE n_per_decode gauge",
        "n_per_decode 4",
        "# TYPE w_version gauge",
        "w_version 4",
    ]
    assert total_health([{"open": 1, "error": "", "version": 3}, {"open": 2, "version": 2}]) == {
        "open": 3,
        "version": 2,
    }
