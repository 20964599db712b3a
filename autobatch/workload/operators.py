"""Operators that this process defined with `torch.library`, for another process, which runs no script to do so."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import library
from torch._library.custom_ops import OPDEFS, CustomOpDef


def schemas() -> dict[str, list[str]]:
    """Names and schemas of all operators defined here, beside torch's own."""
    defined = {name.partition(".")[0] for name in getattr(library, "_defs", ())}  # not a public name
    names = [name for name in sorted(defined) if name.partition("::")[0] not in ("aten", "prims")]
    return {name: [str(schema) for schema in torch._C._jit_get_schemas_for_operator(name)] for name in names}


def define_if_missing(error: Exception, operators: dict[str, list[str]]) -> bool:
    """Whether the error was that of a missing operator that the sender has, which is now defined here too.

    A script defines operators as it runs, and it does not run here; modules that register kernels for them need them.
    """
    missing = re.search(r"operator (\S+::\w+) does not exist", str(error))
    found = operators.pop(missing[1], []) if missing else []
    for schema in found:
        name, signature = schema.split("(", 1)
        library.define(name, f"({signature}")
    return bool(found)


def of_the_script() -> list[CustomOpDef]:
    """Those that the script itself made with `torch.library.custom_op`. `torch.ops` leads to them too, so that nothing
    in a model shows which of them it needs."""
    return [operator for operator in OPDEFS.values() if operator._init_fn.__module__ == "__main__"]


def reduced(operator: CustomOpDef) -> tuple[Any, ...]:
    """How to pickle one: by the name that its module has for it, or else by the functions that it is made of."""
    module, name = operator._init_fn.__module__, operator._init_fn.__qualname__
    if module != "__main__" and getattr(sys.modules.get(module), name, None) is operator:
        return getattr, (sys.modules[module], name)
    functions = operator._init_fn, operator._abstract_fn, operator._backward_fn, operator._setup_context_fn
    return _defined, (operator._qualname, operator._schema, *functions)


def _defined(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any] | None,
    backward: Callable[..., Any] | None,
    setup: Callable[..., Any] | None,
) -> CustomOpDef:
    if name in OPDEFS:
        return OPDEFS[name]
    arguments = torch._C.parse_schema(name + schema).arguments
    mutated = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]
    operator = library.custom_op(name, run, mutates_args=mutated, schema=schema)
    if fake is not None:
        operator.register_fake(fake)
    if backward is not None:
        operator.register_autograd(backward, setup_context=setup)
    return operator
