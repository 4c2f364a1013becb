"""Integer expressions in generated code, evaluated without executing anything.

Only what Inductor writes for sizes is supported: integers, names, + - * // % **, unary signs, min, max and rounding.
"""

import ast
from collections.abc import Mapping

LARGEST = 1 << 62  # beyond any address; keeps hostile input from growing numbers without end
_LARGEST_EXPONENT = 8


class UnknownSize(ValueError):
    """An expression that cannot be evaluated: an unknown name, or something that is not a size."""


def parse(text: str) -> ast.expr | None:
    """The expression in `text`; None when it is not one in Python's syntax."""
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def evaluate(node: ast.expr, values: Mapping[str, int]) -> int:
    """The value of a size expression; UnknownSize when a name has no value or the syntax is not supported."""
    match node:
        case ast.Constant(value=bool()):
            raise UnknownSize("a truth value is not a size")
        case ast.Constant(value=int() as number):
            return _bounded(number)
        case ast.Constant(value=float() as number) if number.is_integer() and abs(number) < LARGEST:
            return int(number)
        case ast.Name(id=name):
            if name not in values:
                raise UnknownSize(name)
            return values[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -evaluate(operand, values)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return evaluate(operand, values)
        case ast.BinOp(left=left, op=op, right=right):
            return _bounded(_binary(op, evaluate(left, values), evaluate(right, values)))
        case ast.Call(func=func, args=args) if args and _called(func) in ("min", "max"):
            numbers = [evaluate(arg, values) for arg in args]
            return max(numbers) if _called(func) == "max" else min(numbers)
        case ast.Call(func=func, args=[above, below]) if _called(func) in ("cdiv", "ceildiv"):
            return -(-evaluate(above, values) // _nonzero(evaluate(below, values)))
        case ast.Call(func=func, args=[inner]) if _called(func) in ("trunc", "int", "floor", "ceil"):
            return evaluate(inner, values)
    raise UnknownSize(f"not a size: {type(node).__name__}")


def names(node: ast.expr) -> set[str]:
    """Every name in an expression."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _binary(op: ast.operator, left: int, right: int) -> int:
    match op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.FloorDiv():
            return left // _nonzero(right)
        case ast.Mod():
            return left % _nonzero(right)
        case ast.Div() if left % _nonzero(right) == 0:
            return left // right
        case ast.Pow() if 0 <= right <= _LARGEST_EXPONENT:
            return _bounded(left) ** right
    raise UnknownSize(f"not an operation on sizes: {type(op).__name__}")


def _nonzero(number: int) -> int:
    if number == 0:
        raise UnknownSize("division by zero")
    return number


def _bounded(number: int) -> int:
    if abs(number) > LARGEST:
        raise UnknownSize("a number too large for a size")
    return number


def _called(func: ast.expr) -> str:
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""
