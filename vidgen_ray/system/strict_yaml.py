"""YAML files of users: no aliases, no duplicate keys, a limited size, and a parsing time that grows with the size only."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from vidgen_ray.limits import MAX_NUMBER_CHARACTERS, MAX_YAML_BYTES


class StrictLoader(yaml.SafeLoader):
    """Safe loader without aliases, a few lines of which can expand to gigabytes, and without duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if duplicates := [key for key, count in keys.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {duplicates[0]!r}", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> Any:
        # PyYAML reads 1:30:00 as a number of base 60, in a time that grows with the square of its length.
        if len(node.value) > MAX_NUMBER_CHARACTERS:
            text = f"a number with more than {MAX_NUMBER_CHARACTERS} characters"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
        is_integer = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if is_integer else self.construct_yaml_float(node)


for kind in ("int", "float"):
    StrictLoader.add_constructor(f"tag:yaml.org,2002:{kind}", StrictLoader.construct_number)


def load_yaml(path: Path) -> Any:
    """Return the content of a YAML file in UTF-8. Raises OSError, yaml.YAMLError, RecursionError and ValueError."""
    if (size := path.stat().st_size) > MAX_YAML_BYTES:
        raise yaml.YAMLError(f"got {size:,} bytes, must be at most {MAX_YAML_BYTES:,}")
    return parse_yaml(path.read_text(encoding="utf-8-sig"))


def parse_yaml(text: str) -> Any:
    """Return the content of a YAML document. Raises yaml.YAMLError, RecursionError and ValueError."""
    return yaml.load(text, StrictLoader)  # noqa: S506  # a subclass of SafeLoader
