import threading
import time

import pytest

from megacontext_jax.infer.calculator import calculate
from tests.infer.mocks import NANOCHAT


@pytest.mark.parametrize(("expression", "value"), NANOCHAT["calculator"])
def test_equals_nanochat(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("-3 + +4", "1"),
        ("--2", "2"),
        ("2*(3-(4-5))/2", "4.0"),
        ("1,000,000*2", "2000000"),
        ("7//2 - 7/2", "-0.5"),
        ("((2))", "2"),
        ("'Banana'.lower().count('b')", "1"),
        ("'banana'.upper().count('a')", "0"),
        ("('ba' 'na').count('a')", "2"),
    ],
)
def test_values(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "1//0",
        "1 2",
        "(1",
        "1(2)",
        "007",
        "...",
        "()*3",
        "().count(1)",
        "(1).count('1')",
        "'a'.count('a').real",
        "'a'.count",
        "'a'.count('a'.count)",
        "'a'.count(1)",
        "'a'.count()",
        "'a'.strip().count('a')",
        "b'a'.count(b'a')",
        "f'a'.count('a')",
        "a.count('a')",
        "'a'.count('a') or 'b'",
        "'a'.__class__.count('a')",
        "9" * 99 + ".0*" + "9" * 99 + ".0*" + "9" * 99 + ".0*" + "9" * 99 + ".0",
        "9" * 101,
        "1" + "+1" * 300,
        "(" * 240 + "1" + ")" * 240,
        "-" * 499 + "1" * 2,
    ],
)
def test_everything_else_has_no_value(expression):
    assert calculate(expression) is None


def test_never_runs_what_it_reads(monkeypatch):
    def executed(*args):
        raise AssertionError(args)

    monkeypatch.setattr("builtins.eval", executed)
    monkeypatch.setattr("builtins.exec", executed)
    assert [calculate(expression) for expression, _ in NANOCHAT["calculator"]] == [
        value for _, value in NANOCHAT["calculator"]
    ]


def test_long_chains_are_quick_in_any_thread():
    results = []
    worst = ["*".join(["99999"] * 83), "(" * 90 + "1" + "/3)" * 90, "+".join(["1"] * 250)]

    def work():
        results.extend(calculate(expression) for expression in worst)

    start = time.perf_counter()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results[0] is None  # 415 digits
    assert float(results[1]) > 0
    assert results[2] == "250"
    assert time.perf_counter() - start < 1
