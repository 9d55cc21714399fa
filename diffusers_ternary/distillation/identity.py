# SPDX-License-Identifier: Apache-2.0
"""What results on disk were made from, as JSON values, and how two of them differ."""

import json
from collections.abc import Mapping
from typing import Any


def json_values(value: Any) -> Any:
    """`value` as it comes back from JSON; what JSON does not know appears as its `repr`."""
    return json.loads(json.dumps(value, default=repr, sort_keys=True))


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested JSON values as one level with dotted names, so that differences can be named."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two identities, e.g. `scheduler.shift: 3.0 there, 1.0 now`; empty if nothing does."""
    old, new = flat(there), flat(now)
    return "; ".join(
        f"{name}: {_brief(old.get(name))} there, {_brief(new.get(name))} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:24]}...{text[-8:]}"
