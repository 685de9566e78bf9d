"""nbval knows nothing of nbdev: give cleaned cells a count, and skip the cells that nbdev skips."""
import re
import pytest

def pytest_collection_modifyitems(items):
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None or cell.get("cell_type") != "code": continue
        cell["execution_count"] = cell.get("execution_count") or 0
        if re.search(r"^#\|\s*(eval:\s*false|slow|cuda)\b", cell["source"], re.M): item.add_marker(pytest.mark.skip(reason="nbdev skips this cell"))
