"""One GraphQL request, answered from nested dictionaries whose values may be functions of the arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import graphql


class Refused(Exception):
    """``Refused(message, status=400)``: answered as GraphQL errors, with this HTTP status."""


class Request:
    def __init__(self, text: str, variables: Mapping[str, Any] | None) -> None:
        nodes: Any = graphql.parse(text, no_location=True).definitions
        self.fragments = {n.name.value: n.selection_set for n in nodes if n.kind == "fragment_definition"}
        operation = next(n for n in nodes if n.kind == "operation_definition")
        given = [v for v in operation.variable_definitions or () if v.default_value]
        self.variables = {v.variable.name.value: graphql.value_from_ast_untyped(v.default_value) for v in given}
        self.variables.update(variables or {})
        self.kind = operation.operation.value
        self.name = operation.name and operation.name.value
        self.selection = operation.selection_set

    def answer(self, roots: Mapping[str, Any]) -> Any:
        """Return what was asked of ``roots``; an unknown field is null, an unknown root an error."""
        return self._select([self.selection], roots, root=self.kind)

    def _arguments(self, node: Any) -> dict[str, Any]:
        return {a.name.value: graphql.value_from_ast_untyped(a.value, self.variables) for a in node.arguments or ()}

    def _fields(self, selection: Any, value: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        for node in selection.selections:
            conditions = {d.name.value: self._arguments(d).get("if") for d in node.directives or ()}
            if conditions.get("include") is False or conditions.get("skip"):
                continue
            if node.kind == "field":
                entry = found.setdefault((node.alias or node.name).value, (node, []))
                entry[1].extend([node.selection_set] if node.selection_set else [])
            elif node.kind == "fragment_spread":
                self._fields(self.fragments[node.name.value], value, found)
            elif not node.type_condition or node.type_condition.name.value == value.get("__typename"):
                self._fields(node.selection_set, value, found)
        return found

    def _select(self, selections: Sequence[Any], value: Any, root: str = "") -> Any:
        if isinstance(value, list):
            return [self._select(selections, v) for v in value]
        if not selections or not isinstance(value, Mapping):
            return value
        fields: dict[str, Any] = {}
        for selection in selections:
            self._fields(selection, value, fields)
        answer = {}
        for alias, (node, inner) in fields.items():
            if root and node.name.value not in value:
                raise Refused(f'Cannot query field "{node.name.value}" on type "{root}".')
            found = value.get(node.name.value)
            answer[alias] = self._select(inner, found(self._arguments(node)) if callable(found) else found)
        return answer


def connection(items: Sequence[Any], arguments: Mapping[str, Any], make: Any) -> dict[str, Any]:
    """Return a page of items as the API lists them; a cursor is the index of the next one."""
    start = int(arguments.get("after") or 0)
    stop = start + int(arguments.get("first") or len(items))
    edges = [{"node": make(x), "cursor": str(i)} for i, x in enumerate(items[start:stop], start + 1)]
    page = {"__typename": "PageInfo", "hasNextPage": stop < len(items), "endCursor": str(min(stop, len(items)))}
    return {"edges": edges, "totalCount": len(items), "pageInfo": page}
