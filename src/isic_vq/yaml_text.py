"""Read YAML that others wrote: numbers as YAML 1.2 has them, aliases only as far as they stay small."""

import re
from collections import Counter
from typing import Any

import yaml

MAX_NODES = 10_000  # values of a document with its aliases written out


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string; this reads it as the number it is in YAML 1.2.

    An alias is one object, however often it is named; whoever copies or prints it would write it out each time.
    """

    def __init__(self, stream: Any):
        super().__init__(stream)
        self.sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias = self.check_event(yaml.AliasEvent)
        node: Any = super().compose_node(parent, index)
        if is_alias and id(node) not in self.sizes:
            raise yaml.YAMLError("an alias holds itself: write its values out")
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = (child if isinstance(child, tuple) else (child,) for child in children)
        self.sizes[id(node)] = 1 + sum(self.sizes[id(child)] for pair in pairs for child in pair)
        if self.sizes[id(node)] > MAX_NODES:
            raise yaml.YAMLError(f"it holds more than {MAX_NODES:,} values with its aliases written out")
        if isinstance(node, yaml.MappingNode) and not is_alias:  # the first of two would be lost
            keys = Counter(str(key.value) for key, _ in node.value)
            for key, number in keys.items():
                if number > 1:
                    raise yaml.YAMLError(f"it names {key!r} {number} times: write one")
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$"), list("-+0123456789.")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
# The resolver added last is asked last; integers must be asked first.
for _first in list("-+0123456789"):
    _Loader.yaml_implicit_resolvers[_first] = sorted(
        _Loader.yaml_implicit_resolvers[_first], key=lambda pair: not pair[0].endswith(":int")
    )


def read_yaml(text: str) -> Any:
    """Parse a YAML document; ValueError, which says where, if it is not YAML or holds more than `MAX_NODES` values."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:300]) from error
