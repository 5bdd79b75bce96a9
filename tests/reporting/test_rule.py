"""The rule picks what its words say, on the published figures and on any."""

import run_folders
from hypothesis import given
from hypothesis import strategies as st

from llm_recipes.reporting.rule import Candidate, Rule, judge, loss_of, pareto_front
from llm_recipes.reporting.scores import Score
from llm_recipes.reporting.texts import Texts

JAPANESE, ENGLISH = "mini.japanese", "mini.english"


def scores(*values: float | None, higher: bool = True) -> dict[str, Score]:
    pairs = zip(run_folders.GROUPS, values, strict=False)
    made = [Score(value, "mini", group, higher=higher) for group, value in pairs if value is not None]
    return {each.name: each for each in made}


def published() -> list[Candidate]:
    base = scores(*run_folders.PUBLISHED[None])
    rates = [rate for rate in run_folders.PUBLISHED if rate is not None]
    return [Candidate(f"{rate:g}", scores(*run_folders.PUBLISHED[rate]), base) for rate in rates]


def test_the_published_search_has_no_winner_at_5_per_cent_and_2e_5_at_8() -> None:
    strict = judge(published(), Rule(JAPANESE, {ENGLISH: 0.05}))
    assert strict.winner is None and not strict.undecided
    assert published()[strict.best or 0].name == "2e-05"
    loose = judge(published(), Rule(JAPANESE, {ENGLISH: 0.08}))
    assert loose.winner is not None and published()[loose.winner].name == "2e-05"
    assert loose.reasons[loose.winner] == []


def test_each_run_hears_why_it_lost() -> None:
    verdict = judge(published(), Rule(JAPANESE, {ENGLISH: 0.05}))
    say = Texts("en")
    said = {
        each.name: [say.reason(why) for why in whys] for each, whys in zip(published(), verdict.reasons, strict=True)
    }
    assert said == {
        "0.0001": [
            "English 0.3600 is 35.7% below base 0.5599: more than 5%", "Japanese 0.3375 is no better than base 0.3725",
        ],
        "1e-06": ["Japanese 0.2182 is no better than base 0.3725"],
        "2e-05": ["English 0.5208 is 7% below base 0.5599: more than 5%"],
        "6e-05": ["English 0.4268 is 23.8% below base 0.5599: more than 5%"],
    }  # fmt: skip
    open_rule = judge(published(), Rule(JAPANESE, {}))
    [worse] = open_rule.reasons[3]
    assert say.reason(worse) == "Japanese 0.3804 < 0.4044 of 2e-05"


def test_without_the_base_s_score_the_rule_is_not_judged() -> None:
    runs = [Candidate("a", scores(0.4, 0.5), scores(0.37)), Candidate("b", scores(0.39, 0.56), scores(0.37))]
    verdict = judge(runs, Rule(JAPANESE, {ENGLISH: 0.05}))
    assert verdict.winner is None and verdict.undecided == [ENGLISH] and verdict.best == 0
    assert [each.key for whys in verdict.reasons for each in whys] == ["undecided", "undecided"]


def test_without_the_base_s_best_the_runs_are_compared_alone() -> None:
    base = {ENGLISH: scores(0.1, 0.55)[ENGLISH]}
    verdict = judge([Candidate("a", scores(0.3, 0.54), base), Candidate("b", scores(0.4, 0.3), base)],
                    Rule(JAPANESE, {ENGLISH: 0.05}))  # fmt: skip
    assert verdict.winner == 0


def test_a_failed_run_and_one_without_a_score_are_never_taken() -> None:
    base = scores(0.3, 0.5)
    runs = [
        Candidate("failed", scores(0.9, 0.5), base, ("failed", {"error": "out of memory"})),
        Candidate("unmeasured", scores(None, 0.5), base),
        Candidate("half", scores(0.8), base),
        Candidate("good", scores(0.31, 0.5), base),
    ]
    verdict = judge(runs, Rule(JAPANESE, {ENGLISH: 0.05}))
    assert verdict.winner == 3
    assert [[each.key for each in whys] for whys in verdict.reasons] == [["failed"], ["no_score"], ["no_score"], []]
    nobody = judge(runs[:2], Rule(JAPANESE, {}))
    assert nobody.winner is None and nobody.best is None


def test_lower_is_better_where_a_score_says_so() -> None:
    base = scores(2.0, higher=False)
    runs = [Candidate("a", scores(1.5, higher=False), base), Candidate("b", scores(1.2, higher=False), base),
            Candidate("c", scores(2.5, higher=False), base)]  # fmt: skip
    verdict = judge(runs, Rule(JAPANESE))
    assert verdict.winner == 1
    assert [[each.key for each in whys] for whys in verdict.reasons] == [["worse"], [], ["not_above_base"]]
    assert loss_of(Score(2.2, "m", "g", higher=False), Score(2.0, "m", "g", higher=False)) == 0.10000000000000009
    assert loss_of(Score(2.2, "m", "g"), Score(0.0, "m", "g")) is None


def test_a_run_that_loses_exactly_its_share_keeps_the_rule() -> None:
    base = scores(0.3, 0.56)
    for english, winner in ((0.56 * 0.95, 0), (0.56 * 0.9499, None)):
        verdict = judge([Candidate("a", scores(0.4, english), base)], Rule(JAPANESE, {ENGLISH: 0.05}))
        assert verdict.winner == winner


COORDINATE = st.floats(-5, 5, allow_nan=False).map(lambda value: round(value, 1))


@given(st.lists(st.tuples(COORDINATE, COORDINATE), max_size=30))
def test_the_front_is_what_nobody_beats(points: list[tuple[float, float]]) -> None:
    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one[0] >= other[0] and one[1] >= other[1] and one != other

    front = pareto_front(points)
    expected = {at for at, point in enumerate(points) if not any(beats(each, point) for each in points)}
    assert set(front) == expected and len(front) == len(expected)
    assert [points[at][0] for at in front] == sorted(points[at][0] for at in front)
