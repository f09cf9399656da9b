"""A bounded Jinja sandbox for chat templates: the options, filters and globals of transformers' `apply_chat_template`.

A template is a program from a stranger. It sees only its variables, and its work is bounded: loop iterations and macro
calls (`_MAX_ITERATIONS`), and the length of its output and of every string that it joins, adds or multiplies
(`_MAX_LENGTH`). A template that exceeds a bound is refused, as is any other error in it. (Not bounded: a single filter
or method that makes a huge string by itself, such as `center`.)
"""

import functools
import json
import re

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from msn_jax.cli import InputError

_MAX_ITERATIONS = 1_000_000  # of all loops and macros in one rendering; about ten of them per second
_MAX_LENGTH = 1 << 25  # characters


class _Unbounded(jinja2.TemplateError):
    pass


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox, which counts a template's work."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols])
        self.has_generation_blocks = False
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        del self.globals["lipsum"]
        self.begin(("", ""))

    def begin(self, markers: tuple[str, str]) -> None:
        """Resets the counters before a rendering; `markers` go around the output of `{% generation %}` blocks."""
        self.markers = markers
        self._iterations = 0

    def count_iteration(self) -> None:
        """Counts one iteration of a loop or call of a macro."""
        self._iterations += 1
        if self._iterations > _MAX_ITERATIONS:
            raise _Unbounded(f"it loops more than {_MAX_ITERATIONS} times")

    def check_length(self, length: int) -> int:
        """Returns a length that is within the bound."""
        if length > _MAX_LENGTH:
            raise _Unbounded(f"it makes a text of more than {_MAX_LENGTH} characters")
        return length

    def join(self, *parts: object) -> str:
        """Implements `a ~ b`."""
        texts = [str(part) for part in parts]
        self.check_length(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context, operator, left, right):
        """Checks the size of a result before the operator makes it."""
        sizes = [len(side) if isinstance(side, str | list | tuple) else None for side in (left, right)]
        if operator == "+" and None not in sizes:
            self.check_length(sum(sizes))
        elif operator == "*" and sizes != [None, None]:
            sized, times = (sizes[0], right) if sizes[0] is not None else (sizes[1], left)
            self.check_length(sized * times if isinstance(times, int) else 0)
        elif operator == "%" and isinstance(left, str) and re.search(r"\d{5}|\*", left):
            raise _Unbounded("it formats a text with a width of five digits or more")
        elif operator in ("*", "**") and all(isinstance(side, int) for side in (left, right)):
            self.check_length(left.bit_length() * max(right, 1) if operator == "**" else left.bit_length())
        return super().call_binop(context, operator, left, right)

    def _generate(self, source: nodes.Template, name, filename, defer_init=False):
        """Jinja's hook between parser and code generator: makes loops and macros count, and `~` check its length."""
        for node in list(source.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            count = nodes.Call(nodes.EnvironmentAttribute("count_iteration"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(count).set_lineno(node.lineno))
        source = _BoundedJoins().visit(source).set_environment(self)
        return super()._generate(source, name, filename, defer_init)


class _BoundedJoins(NodeTransformer):
    """Turns `a ~ b` into a call of the environment's `join`."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        join = nodes.EnvironmentAttribute("join")
        return nodes.Call(join, node.nodes, [], None, None).set_lineno(node.lineno)


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: prints its body between the environment's markers."""

    tags = frozenset(["generation"])

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.environment.has_generation_blocks = True
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        opening, closing = self.environment.markers
        return f"{opening}{caller()}{closing}"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as transformers writes it; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=64)
def compile_template(source: str, location: str) -> tuple[Environment, jinja2.Template]:
    """The environment and the compiled template. InputError, starting with `location`, if its syntax is broken."""
    environment = Environment()
    try:
        return environment, environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise InputError(f"{location}: the chat template is broken: {error}") from error
