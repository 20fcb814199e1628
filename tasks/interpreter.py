"""An interpreter for a subset of Python: numbers, texts, flat lists, if, for, while, functions.

It walks the syntax tree and never hands a program to Python. The number of steps, the depth and the
sizes are bounded; a program that exceeds a bound fails. A Python program that runs here gives the
same result as in Python, with four exceptions: a tuple becomes a list, x += y means x = x + y, the
arguments of a method are evaluated before its owner, and print ignores sep and end. Some programs
that fail in Python run here, such as one that calls sum() after sum = 3. [O]
"""
import ast
import copy
import operator as ops
from itertools import pairwise

from .verify import answer_and_gold, parse_python

STEPS, DEPTH, LONGEST, LARGEST = 40_000, 150, 200, 10 ** 15
# Everything that parsing and running a program can raise. ValueError: something that the language
# does not have, or too much of it; AttributeError: a node of an unknown form.
FAULTS = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, SyntaxError,
          MemoryError, RecursionError)
OPERATORS = {
    ast.Add: ops.add, ast.Sub: ops.sub, ast.Mult: ops.mul, ast.FloorDiv: ops.floordiv,
    ast.Mod: ops.mod, ast.Pow: ops.pow, ast.Eq: ops.eq, ast.NotEq: ops.ne, ast.Lt: ops.lt,
    ast.LtE: ops.le, ast.Gt: ops.gt, ast.GtE: ops.ge, ast.Not: ops.not_, ast.USub: ops.neg,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b}
FUNCTIONS = {f.__name__: f for f in (abs, all, any, bool, chr, int, len, list, max, min, ord,
                                     range, sorted, str, sum)}
METHODS = {list: "append copy count extend index insert pop remove reverse sort".split(),
           str: "count find index isalpha isdigit join lower replace split strip upper".split()}
# The value of each kind of expression: functions of (m, the Machine; n, the node of the tree).
EXPRESSIONS = {
    ast.Name: lambda m, n: m.names[n.id],
    ast.Constant: lambda m, n: bound(n.value),
    ast.UnaryOp: lambda m, n: OPERATORS[type(n.op)](m.value(n.operand)),
    ast.BinOp: lambda m, n: m.operate(n.op, m.value(n.left), m.value(n.right)),
    ast.Compare: lambda m, n: all(m.operate(op, *pair) for op, pair in zip(
        n.ops, pairwise(map(m.value, (n.left, *n.comparators))))),      # stops at the first no
    ast.IfExp: lambda m, n: m.value(n.body if m.value(n.test) else n.orelse),
    ast.Subscript: lambda m, n: m.value(n.value)[m.value(n.slice)],
    ast.Slice: lambda m, n: slice(*(e and m.value(e) for e in (n.lower, n.upper, n.step))),
    ast.List: lambda m, n: bound([m.value(part) for part in n.elts]),
    ast.Tuple: lambda m, n: bound([m.value(part) for part in n.elts]),     # taken for a list
    ast.ListComp: lambda m, n: bound(list(m.each(n))),
    ast.GeneratorExp: lambda m, n: bound(list(m.each(n))),
    ast.Call: lambda m, n: bound(m.call(n.func, [m.value(arg) for arg in n.args],
                                        {k.arg: m.value(k.value) for k in n.keywords})),
}


def size(value) -> int:
    """The number of items or characters of a value; 0 for a number."""
    return len(value) if isinstance(value, (str, list, range)) else 0


def bound(value):
    """Return the value. Raises ValueError if it is too large, a fraction, or a list in a list:
    nested lists could grow beyond the bound, and could contain themselves."""
    good = (value is None or isinstance(value, range)
            or isinstance(value, int) and abs(value) <= LARGEST
            or isinstance(value, (str, list)) and len(value) <= LONGEST
            and not any(isinstance(item, (list, range)) for item in value))
    if not good:
        raise ValueError("too large, or not in the language")
    return value


class Machine:
    """Runs a program; then `invoke` calls its functions. One budget of steps covers everything. A
    function sees only its own names. trace: a list of all (name, value) assigned. Raises FAULTS."""

    def __init__(self, code: str, trace: list | None = None):
        self.steps = self.depth = 0
        self.names, self.functions, self.printed, self.trace = {}, {}, [], trace
        self.run(parse_python(code).body)

    def tick(self, cost=1, deeper=0):
        """Count steps, and enter `deeper` levels. Raises ValueError if a budget is exceeded."""
        self.steps += cost
        self.depth += deeper
        if self.steps > STEPS or self.depth > DEPTH:
            raise ValueError("too long or too deep")

    def invoke(self, name: str, args: list):
        """Call a function of the program and return its result."""
        function, outer, self.names = self.functions[name], self.names, {}
        self.bind(function.args, args)
        result = self.run(function.body)
        self.names = outer
        return result[0] if isinstance(result, tuple) else None

    def bind(self, target, value):
        """Assign to a name or parameter, to several, or to one item of a list."""
        match target:
            case ast.Name(id=name) | ast.arg(arg=name):
                self.names[name] = value
                if self.trace is not None:
                    self.trace.append((name, str(value)))
            case ast.Tuple(elts=parts) | ast.arguments(args=parts):
                for part, item in zip(parts, value, strict=True):
                    self.bind(part, item)
            case _:
                owner, at = self.value(target.value), self.value(target.slice)
                if type(owner) is not list or type(at) is not int:
                    raise ValueError("only one item of a list can be replaced")
                owner[at] = bound([value])[0]

    def run(self, body):
        """Run statements -> why they were left: "break", "continue", (the result,), None."""
        self.tick(deeper=1)
        way = None
        for statement in body:
            way = self.do(statement)
            if way:             # it leaves the block: what follows in it is not run
                break
        self.depth -= 1
        return way

    def do(self, node):
        """Run one statement. Returns as `run` does."""
        self.tick()
        match node:
            case ast.Expr():
                self.value(node.value)
            case ast.Assign():
                value = self.value(node.value)
                for target in node.targets:
                    self.bind(target, value)
            case ast.AugAssign():
                old, by = self.value(node.target), self.value(node.value)
                self.bind(node.target, self.operate(node.op, old, by))
            case ast.If():
                return self.run(node.body if self.value(node.test) else node.orelse)
            case ast.For(orelse=[]) | ast.While(orelse=[]):
                for _ in self.rounds(node):
                    way = self.run(node.body)
                    if way and way != "continue":
                        return None if way == "break" else way
            case ast.FunctionDef(decorator_list=[]):
                self.functions[node.name] = node
            case ast.Return():
                return (node.value and self.value(node.value),)
            case ast.Break() | ast.Continue():
                return type(node).__name__.lower()
            case _ if not isinstance(node, ast.Pass):
                raise ValueError(f"{type(node).__name__} is not in the language")

    def rounds(self, loop):
        """Yield once for each iteration of a loop."""
        if isinstance(loop, ast.While):
            while self.value(loop.test):
                yield
        else:
            for item in self.value(loop.iter):
                self.bind(loop.target, item)
                yield

    def each(self, node):
        """Yield the items of a list comprehension with one `for`."""
        outer, self.names, (loop,) = self.names, dict(self.names), node.generators
        for _ in self.rounds(loop):
            if all(self.value(test) for test in loop.ifs):
                yield self.value(node.elt)
        self.names = outer

    def value(self, node):
        """The value of an expression."""
        self.tick(deeper=1)
        if isinstance(node, ast.BoolOp):
            for part in node.values:
                result = self.value(part)
                if bool(result) == isinstance(node.op, ast.Or):
                    break
        else:
            result = EXPRESSIONS[type(node)](self, node)
        self.depth -= 1
        return result

    def operate(self, op, left, right):
        """left op right. Long operands cost more; what would become too large is refused."""
        kind = type(op)
        if long := size(left) + size(right):
            self.tick(long >> 4)
            if kind is ast.Mult and max(size(left) and right, size(right) and left) > LONGEST or \
                    kind is ast.Mod:            # text % value formats, to any width
                raise ValueError("too large, or not in the language")
        if kind is ast.Pow and not 0 <= right <= 60:
            raise ValueError("too large")
        return bound(OPERATORS[kind](left, right))

    def call(self, function, args, named):
        """Call a method, a function of the program, or a built-in function."""
        self.tick(sum(map(size, args)))
        if isinstance(function, ast.Attribute):
            owner = self.value(function.value)
            if function.attr not in METHODS.get(type(owner), ()):
                raise ValueError(f"no method {function.attr}")
            result = getattr(owner, function.attr)(*args, **named)
            if type(bound(owner)) is list and isinstance(function.value, ast.Name):
                self.bind(function.value, owner)        # for the trace: it may have changed
            return result
        if function.id in self.functions and not named:
            return self.invoke(function.id, args)
        if function.id == "print":
            text = " ".join(map(str, args))
            self.tick(len(text) >> 4)       # a list of texts may be long in print
            return self.printed.append(text)
        return FUNCTIONS[function.id](*args, **named)


def solves(evidence: dict) -> float:
    """EXEC: 1 if the boxed function is right in every hidden case, else 0; with partial credit a
    constant function would earn something. [O]"""
    code, gold = answer_and_gold(evidence)
    name, cases = gold["name"], copy.deepcopy(gold["cases"])    # a program may sort them in place
    try:
        machine = Machine(code)
        found = [(machine.invoke(name, args), result) for args, result in cases]
    except FAULTS:
        return 0.0
    return float(all(type(got) is type(result) and got == result for got, result in found))
