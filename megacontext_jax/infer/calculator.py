"""The calculator the model may call: nanochat's expressions, walked as a syntax tree and never executed.

Arithmetic is `+ - * / //` with parentheses on decimal numbers (commas are thousands marks); text is
`'word'.count('letter')`. Nothing else has a value. There is no power operator, so an answer has no more digits
than its question; length and depth are bounded, and no timer is needed.
"""

import ast
import math
import operator

MAX_EXPRESSION = 500  # characters
MAX_RESULT = 100

_ARITHMETIC = frozenset("0123456789*+-/.() ")
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_COUNTING = _LETTERS | frozenset("0123456789'\"()._ ")
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_NO_VALUE = (ArithmeticError, SyntaxError, ValueError, RecursionError, MemoryError)


def calculate(expression: str) -> str | None:
    """The printed value of an expression, or None where it has none. Safe in any thread."""
    expression = expression.replace(",", "")
    if len(expression) > MAX_EXPRESSION:
        return None
    letters = set(expression)
    if letters <= _ARITHMETIC and "**" not in expression:
        evaluate = _arithmetic
    elif letters <= _COUNTING and ".count(" in expression:
        evaluate = _count
    else:
        return None
    try:
        value = evaluate(ast.parse(expression.lstrip(" "), mode="eval").body)
    except _NO_VALUE:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    text = str(value)
    return text if len(text) <= MAX_RESULT else None


def _arithmetic(node: ast.expr) -> int | float | tuple:
    match node:
        case ast.Tuple(elts=[]):  # an empty pair of parentheses is its own value, as in nanochat
            return ()
        case _:
            return _number(node)


def _number(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_number(left), _number(right))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_number(operand))
    raise ValueError("not arithmetic")


def _count(node: ast.expr) -> int:
    match node:
        case ast.Call(
            func=ast.Attribute(value=text, attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            return _text(text).count(part)
    raise ValueError("not a count")


def _text(node: ast.expr) -> str:
    """A string literal, or one with its case changed."""
    match node:
        case ast.Constant(value=str() as text):
            return text
        case ast.Call(func=ast.Attribute(value=text, attr="lower" | "upper" as change), args=[], keywords=[]):
            return getattr(_text(text), change)()
    raise ValueError("not text")
