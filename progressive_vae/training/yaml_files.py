"""Reading YAML files strictly."""

from pathlib import Path
from typing import Any

import yaml


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, without duplicate keys and without values that contain themselves."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        return super().construct_object(node, deep=True)  # where PyYAML detects recursive nodes

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Later, merge keys (`<<`) add keys of other mappings, which are no duplicates.
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                places = f"in lines {lines[name]} and {line}"
                raise yaml.YAMLError(f"the key {key.value!r} twice, {places}")
            lines[name] = line
        return node


def read_yaml(path: Path, advice: str = "") -> Any:
    """Return the contents of a YAML file in UTF-8, or in UTF-16 with a byte order mark.

    Args:
        advice: what to do about a damaged file, for the error.

    Raises:
        ValueError: it is not YAML, has a duplicate key, or an alias inside its own anchor.
    """
    try:
        return yaml.load(path.read_bytes(), UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        words = " ".join(str(error).split())
        raise ValueError(
            f"expected YAML in {path}, got {words}{advice and f': {advice}'}"
        ) from error
